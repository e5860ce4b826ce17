"""Results as Markdown tables: a marker in a file names the kind and the results, and this fills it in."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from ettin.artifacts.errors import InputError
from ettin.bench.machine import read_result

# Published with the release (model cards and blog post): mean nDCG@10 over NanoBEIR's 13 sets with 100 candidates, and
# pairs/s on Natural Questions at max_length 512 and the best batch, in the same order of sizes.
NANOBEIR_NDCG10 = {"17m": 0.6746, "32m": 0.6825, "68m": 0.6915, "150m": 0.7086, "400m": 0.7193, "1b": 0.7237}
PUBLISHED_PAIRS_PER_S = {
    "H100, bf16 FlashAttention-2, unpadded": (7517, 6602, 4913, 3237, 1738, 928),
    "RTX 3090, bf16 FlashAttention-2, unpadded": (9008, 4497, 1916, 982, 429, 189),
    "i7-13700K, fp32": (267.4, 92.5, 31.2, 14.0, 5.2, 2.1),
}

_MARKED = re.compile(r"(<!-- table: (\w+) ([^>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_NAMES = {
    "st-fp32": "sentence-transformers fp32, its default batch of 32",
    "st-fp32-tuned": "sentence-transformers fp32, its best batch size",
    "st-bf16": "sentence-transformers bf16",
    "traced": "the model traced into OpenVINO as it is, bf16",
    "traced-f32": "the same, f32",
    "traced-int8": "the same, int8 by stock NNCF",
    "triton": "Triton, gRPC",
    "http": "`ettin-serve`, HTTP",
}

Result = dict[str, Any]
Rows = list[list[str]]


def filled(text: str, root: Path) -> str:
    """The text with every table made again that `<!-- table: KIND FILE… -->` and `<!-- end of table -->` mark.

    Raises:
        InputError: an unknown kind, or a result that is missing or of another kind.
    """

    def table(match: re.Match[str]) -> str:
        start, kind, names, end = match.groups()
        if kind not in TABLES:
            raise InputError(f"unknown table '{kind}', expected one of: {', '.join(TABLES)}")
        try:
            contents = (read_result(root / name) for name in names.split())
            rows = TABLES[kind]([content["result"] | {"machine": content["machine"]} for content in contents])
        except KeyError as error:
            raise InputError(f"table '{kind}': its results lack {error}. Name results of that kind") from None
        return f"{start}\n{tabulate(rows, headers='firstrow', tablefmt='github', disable_numparse=True)}\n\n{end}"

    return _MARKED.sub(table, text)


def label(name: str, is_searched: bool = False) -> str:
    """What a table calls a contestant or an artifact, in Markdown."""
    target, has_precision, precision = name.rsplit("/", 1)[-1].partition("-")
    if "/" in name and has_precision:
        return f"`{target}` {precision}"
    return _NAMES.get(name, name).partition(", its default" if is_searched else "\n")[0]


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _figure(key: str, form: str) -> Callable[[Result], str]:
    """A column that shows one figure of a row, where it is there."""
    return lambda row: form.format(row[key]) if row.get(key) is not None else ""


def _error(row: Result) -> str:
    if row["nan"]:
        return f"{row['nan']} scores are NaN"
    return f"{row['max_abs_error']:.0e}" if row.get("max_abs_error") else ""  # the reference itself has none


def _percentiles(row: Result) -> str:
    keys = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms")
    return " / ".join(f"{row[key]:.0f}" for key in keys if key in row) + " ms"


_CONTEST: dict[str, Callable[[Result], str]] = {
    "pairs/s": lambda row: number(row["pairs_per_s"]),
    "×": _figure("times", "{}"),
    "batch": lambda row: f"{row['batch']['best']} {row['batch']['unit']}" if "best" in row.get("batch", {}) else "",
    "padding": _figure("padding_share", "{:.0%}"),
    "of peak": _figure("share_of_peak", "{:.0%}"),
    "p50 / p95 / p99, {} documents": _percentiles,
    "one query, {} documents": _figure("latency_p50_ms", "{:.0f} ms"),
    "load": _figure("load_s", "{:.1f} s"),
    "peak memory": lambda row: (
        _figure("peak_rss_mib", "{:.0f} MiB")(row) + _figure("peak_gpu_mib", ", GPU {:.0f}")(row)
    ),
    "size": _figure("size_mib", "{:.0f} MiB"),
    "largest error": _error,
}


def _contest(*left_out: str) -> Callable[[Sequence[Result]], Rows]:
    """A table with a line for each contestant of one run."""
    columns = {title: show for title, show in _CONTEST.items() if not title.startswith(left_out)}

    def table(results: Sequence[Result]) -> Rows:
        (result,) = results
        if "lengths" in result:
            return _lengths(results)
        speeds = {row["name"]: row.get("pairs_per_s") for row in result["contestants"]}
        names = ("st-fp32-tuned", "st-fp32", "sentence-transformers fp32")  # the best that a user of it would have
        base = next((speeds[name] for name in names if speeds.get(name)), None)
        rows = [["what runs", *(title.format(result["candidates"]) for title in columns)]]
        for row in result["contestants"]:
            shown = ["–"] * (len(columns) - 1) + [str(row.get("problem"))[:80]]
            if "pairs_per_s" in row:
                row["times"] = f"{row['pairs_per_s'] / base:.1f}" if base else None
                if "ratio" in row:
                    row["times"] = "{median:.2f} ({low:.2f} … {high:.2f})".format(**row["ratio"])
                    row["times"] += " of before" if row["ratio"]["to"].startswith(f"{row['name']} (") else ""
                shown = [show(row) for show in columns.values()]
            rows.append([label(row["name"], "best" in row.get("batch", {})), *shown])
        kept = [index for index, _ in enumerate(rows[0]) if any(row[index] for row in rows[1:])]
        return [[row[index] for index in kept] for row in rows]

    return table


def _lengths(results: Sequence[Result]) -> Rows:
    """One line for each length: pairs per second of every contestant."""
    (result,) = results
    names = [row["name"] for row in result["lengths"][0]["contestants"]]
    rows = [["tokens", *map(label, names)]]
    for step in result["lengths"]:
        speeds = {row["name"]: number(row["pairs_per_s"]) for row in step["contestants"] if "pairs_per_s" in row}
        rows.append([str(step["max_length"]), *(speeds.get(name, "–") for name in names)])
    return rows


def _shapes(results: Sequence[Result]) -> Rows:
    """One line for each run: int8 against sentence-transformers."""
    rows = [["shape, weights", "instructions", "`openvino` int8", "fp32, batch 32", "×", "fp32, best batch", "×"]]
    for result in results:
        speeds = {row["name"]: row["pairs_per_s"] for row in result["contestants"]}
        name = next(name for name in speeds if name.endswith("openvino-int8"))
        peers = [speeds[peer] for peer in ("st-fp32", "st-fp32-tuned")]
        kind = "random" if result["weights"] == "random" else "trained"
        what = f"{name.split('/')[0]}, {kind} ({result['data'].split('-')[0]}, {result['pairs']} pairs)"
        against = [text for speed in peers for text in (number(speed), f"{speeds[name] / speed:.1f}")]
        best = "AMX" if "amx_int8" in result["machine"]["isa"] else "AVX-512"
        limit = best if result["isa"] == "all" else result["isa"].upper().replace("_", "-")
        limit += ", pretended" if result["machine"].get("pretended") else ""
        rows.append([what, limit, number(speeds[name]), *against])
    return rows


def _change(row: Result) -> str:
    ends = row.get("ndcg10_change_95", [])
    return f"{row['ndcg10_change']:+.4f} ({' … '.join(f'{end:+.4f}' for end in ends)})" if ends else ""


_QUALITY: dict[str, Callable[[Result], str]] = {
    "nDCG@10": _figure("ndcg10", "{:.4f}"),
    "change (95 %)": _change,
    "largest error": _figure("max_abs_error", "{:.0e}"),
    "Spearman": _figure("spearman", "{:.5f}"),
    "Kendall": _figure("kendall", "{:.5f}"),
    "MAP": _figure("map", "{:.4f}"),
    "MRR@10": _figure("mrr10", "{:.4f}"),
    "published": _figure("published_ndcg10", "{:.4f}"),
}


def _quality(results: Sequence[Result]) -> Rows:
    """One line for each artifact (of several the latest), a group of columns for each set; of one set, all figures."""
    sets: dict[str, dict[str, Result]] = {}
    for result in results:
        sets.setdefault(result["data"], {}).update({row["artifact"]: row for row in result["rows"]})
    names = list(dict.fromkeys(name for by_artifact in sets.values() for name in by_artifact))
    rows = [["what ranks"], *([label(name)] for name in names)]
    for data, by_artifact in sets.items():
        titles = list(_QUALITY)[: 4 if len(sets) > 1 else None]
        titles = [title for title in titles if any(map(_QUALITY[title], by_artifact.values()))]
        rows[0] += [data.replace("/", ", ") + ": " + titles[0], *titles[1:]]
        for name, line in zip(names, rows[1:], strict=True):
            line += [_QUALITY[title](by_artifact[name]) if name in by_artifact else "–" for title in titles]
    return rows


def _parity(results: Sequence[Result]) -> Rows:
    """One line for each artifact."""
    rows = [["target", "precision", "pairs", "largest / mean error", "Spearman", "size"]]
    for row in (row for result in results for row in result["rows"]):
        target, _, precision = label(row["artifact"]).partition(" ")
        is_verified = row["status"] == "verified"
        errors = f"{row['max_abs_error']:.0e} / {row['mean_abs_error']:.0e}" if is_verified else "unproven"
        spearman = _figure("spearman", "{:.5f}")(row)
        rows.append([target, precision, str(row["pairs"]), errors, spearman, f"{row['size_mib']:.0f} MiB"])
    return rows


def _profile(results: Sequence[Result]) -> Rows:
    """Where the time goes, a group of columns for each run."""
    least_ms = results[0]["milliseconds"] / 50
    rows = [["part"], *([part["part"]] for part in results[0]["parts"] if part["milliseconds"] > least_ms)]
    for result in results:
        rows[0] += [f"{(result['isa_limit'] or 'all').replace('_', '-')}: share", "of peak"]
        parts = {part["part"]: part for part in result["parts"]}
        for row in rows[1:]:
            of_peak = _figure("share_of_peak", "{:.0%}")(parts[row[0]])
            row += [f"{parts[row[0]]['milliseconds'] / result['milliseconds']:.0%}", of_peak]
    return rows


def _load(results: Sequence[Result]) -> Rows:
    """One line for each server."""
    latencies = ["p50 / p95 / p99, all candidates", "… one document"]
    counts = ["answers", "wrong", "lost"]
    rows = [["server", "pairs/s", "of the same in process", *latencies, *counts, "memory, first to last"]]
    for result in results:
        for name, row in result["servers"].items():
            times_ms = [row["mixed"]["latency_ms"].get(str(count), {}) for count in (result["candidates"], 1)]
            times = [" / ".join(f"{value / 1000:.2f}" for value in by_share.values()) + " s" for by_share in times_ms]
            answers = [str(row["mixed"][key] + row["full"][key]) for key in counts]
            memory = f"{row['memory_mib'][0]:.0f} – {row['memory_mib'][-1]:.0f} MiB"
            share = f"{row['share_of_in_process']:.0%}"
            rows.append([label(name), number(median(row["pairs_per_s"])), share, *times, *answers, memory])
    return rows


def _gpu(results: Sequence[Result]) -> Rows:
    """One line for each setting of a visit to a GPU: parity, and pairs per second of each size."""
    (result,) = results
    errors, sizes = result.get("parity", {}).get("rows", {}), result.get("speed", {})
    rows = [["setting", "mean error", "of FlashAttention-2's", *(f"{size}, pairs/s" for size in sizes)]]
    contests = [[result.get(part, {}).get(size, {}) for part in ("compile", "speed")] for size in sizes]
    by_size = [{row["name"]: row for contest in both for row in contest.get("contestants", ())} for both in contests]
    for name in dict.fromkeys(name for group in (errors, *by_size) for name in group):
        error = errors.get(name, {})
        rows.append([name, _figure("mean_abs_error", "{:.1e}")(error), _figure("of_reference", "{:.2f}")(error)])
        for size in by_size:
            row = size.get(name, {})
            rows[-1].append(number(row["pairs_per_s"]) if "pairs_per_s" in row else str(row.get("problem", ""))[:80])
    return rows


TABLES: dict[str, Callable[[Sequence[Result]], Rows]] = {
    "speed": _contest("one query"),
    "shapes": _shapes,
    "quality": _quality,
    "parity": _parity,
    "profile": _profile,
    "load": _load,
    "gpu": _gpu,
    # Kinds of earlier results:
    "cpu": _contest("batch", "padding", "of peak", "p50", "size"),
    "peers": _contest("batch", "padding", "of peak", "p50", "size"),
    "throughput": _contest("one query", "largest error"),
    "lengths": _lengths,
}
