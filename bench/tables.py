"""Tables of a Markdown file, made from results: a marker names kind and files, `ettin-bench tables` fills it in."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from ettin.artifacts.errors import InputError
from ettin.bench.machine import read_result

_MARKED = re.compile(r"(<!-- table: (\w+) ([^>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

_NAMES = {
    "st-fp32": "sentence-transformers fp32, its default batch of 32",
    "st-fp32-tuned": "sentence-transformers fp32, its best batch size",
    "st-bf16": "sentence-transformers bf16",
    "traced": "the model traced into OpenVINO as it is, bf16",
    "traced-f32": "the same, f32",
    "traced-int8": "the same, int8 by stock NNCF",
}

_AT_ITS_BEST = {"st-fp32": "sentence-transformers fp32", "st-bf16": "sentence-transformers bf16"}
_LATENCIES = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms")

Result = dict[str, Any]


def filled(text: str, root: Path) -> str:
    """The text with every marked table made again.

    Args:
        text: Markdown with `<!-- table: KIND FILE… -->` and `<!-- end of table -->`.
        root: what the files' paths are relative to.

    Raises:
        InputError: an unknown kind, or a result that is missing or of another kind.
    """

    def table(match: re.Match[str]) -> str:
        start, kind, names, end = match.groups()
        if kind not in TABLES:
            raise InputError(f"unknown table '{kind}', expected one of: {', '.join(TABLES)}")
        try:
            rows = TABLES[kind]([read_result(root / name)["result"] for name in names.split()])
        except KeyError as error:
            raise InputError(f"table '{kind}': its results lack {error}. Name results of ettin-bench {kind}") from None
        return f"{start}\n{tabulate(rows, headers='firstrow', tablefmt='github', disable_numparse=True)}\n\n{end}"

    return _MARKED.sub(table, text)


def label(contestant: Mapping[str, Any]) -> str:
    """What a contestant is called."""
    name = contestant["name"]
    if "/" in name:
        return artifact_label(name)
    searched = "best" in contestant.get("batch", {})
    return (searched and _AT_ITS_BEST.get(name)) or _NAMES.get(name, name)


def artifact_label(name: str) -> str:
    """What an artifact is called: target and precision."""
    target, has_precision, precision = name.rsplit("/", 1)[-1].partition("-")
    return f"`{target}` {precision}" if has_precision else name


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _by_name(result: Result) -> dict[str, Result]:
    return {each["name"]: each for each in result["contestants"]}


def _base(result: Result) -> Result | None:
    """What the others are divided by, if it ran."""
    found = _by_name(result)
    chosen = found.get("st-fp32") or found.get("sentence-transformers fp32")
    return chosen if chosen and "pairs_per_s" in chosen else None


def _error(row: Result) -> str:
    if row["nan"]:
        return f"{row['nan']} scores are NaN"
    return f"{row['max_abs_error']:.0e}" if row.get("max_abs_error") else ""


def _cpu(results: Sequence[Result]) -> list[list[str]]:
    """Every contestant of one run."""
    (result,) = results
    base = _base(result)
    count = result["candidates"]
    rows = [["what runs", "pairs/s", "×", f"one query, {count} documents", "load", "peak memory", "largest error"]]
    for row in result["contestants"]:
        if "pairs_per_s" not in row:
            rows.append([label(row), *["–"] * 5, str(row["problem"])[:80]])
            continue
        times = f"{row['pairs_per_s'] / base['pairs_per_s']:.1f}" if base else ""
        rows.append([
            label(row), number(row['pairs_per_s']), times, f"{row['latency_p50_ms']:.0f} ms",
            f"{row['load_s']:.1f} s", f"{row['peak_rss_mib']:.0f} MiB", _error(row),
        ])  # fmt: skip
    return rows


def _throughput(results: Sequence[Result]) -> list[list[str]]:
    """Every contestant of one run, at its best batch."""
    (result,) = results
    base = _base(result)
    count = result["candidates"]
    rows = [["what runs", "pairs/s", "×", "batch", "padding", "of peak", f"p50 / p95 / p99, {count} documents",
             "load", "peak memory", "size"]]  # fmt: skip
    for row in result["contestants"]:
        if "pairs_per_s" not in row:
            rows.append([label(row), *["–"] * 8, str(row["problem"])[:80]])
            continue
        times = " / ".join(f"{row[key]:.0f}" for key in _LATENCIES if key in row) + " ms"
        batch = f"{row['batch']['best']} {row['batch']['unit']}" if "best" in row["batch"] else ""
        memory = f"{row['peak_rss_mib']:.0f} MiB" + (f", GPU {row['peak_gpu_mib']:.0f}" if row["peak_gpu_mib"] else "")
        rows.append([
            label(row), number(row["pairs_per_s"]),
            f"{row['pairs_per_s'] / base['pairs_per_s']:.1f}" if base else "", batch,
            _percent(row["padding_share"]), _percent(row["share_of_peak"]), times, f"{row['load_s']:.1f} s", memory,
            f"{row['size_mib']:.0f} MiB" if row["size_mib"] else "",
        ])  # fmt: skip
    return _without_empty(rows)


def _without_empty(rows: list[list[str]]) -> list[list[str]]:
    """The table without columns that hold nothing."""
    kept = [at for at in range(len(rows[0])) if any(row[at] for row in rows[1:])]
    return [[row[at] for at in kept] for row in rows]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _shapes(results: Sequence[Result]) -> list[list[str]]:
    """One line for each run: int8 against sentence-transformers."""
    rows = [["shape, weights", "instructions", "`openvino` int8", "fp32, batch 32", "×", "fp32, best batch", "×"]]
    for result in results:
        entries = _by_name(result)
        ours = next(row for name, row in entries.items() if name.endswith("openvino-int8"))
        shape = ours["name"].split("/")[0]
        speeds = [entries[peer]["pairs_per_s"] for peer in ("st-fp32", "st-fp32-tuned")]
        peers = [text for speed in speeds for text in (number(speed), f"{ours['pairs_per_s'] / speed:.1f}")]
        kind = "random" if result["weights"] == "random" else "trained"
        limit = "all" if result["isa"] == "all" else result["isa"].upper().replace("_", "-")
        where = f"{result['data'].split('-')[0]}, {result['pairs']} pairs"
        rows.append([f"{shape}, {kind} ({where})", limit, number(ours["pairs_per_s"]), *peers])
    return rows


def _quality(results: Sequence[Result]) -> list[list[str]]:
    """One line for each artifact, a group of columns for each set; of a single set, all figures.

    Of several results of a set, a later one's line replaces an earlier one's of the same artifact.
    """
    sets: dict[str, dict[str, Result]] = {}
    for result in results:
        sets.setdefault(result["data"], {}).update({row["artifact"]: row for row in result["rows"]})
    names = list(dict.fromkeys(name for found in sets.values() for name in found))
    rows = [["what ranks"], *([artifact_label(name)] for name in names)]
    for data, found in sets.items():
        columns = _QUALITY if len(sets) > 1 else _QUALITY | _MORE_QUALITY
        shown = {title: show for title, show in columns.items() if any(map(show, found.values()))}
        name = data.replace("/", ", ")
        rows[0] += [f"{name}: {title}" if at == 0 else title for at, title in enumerate(shown)]
        for artifact, line in zip(names, rows[1:], strict=True):
            line += [show(found[artifact]) if artifact in found else "–" for show in shown.values()]
    return rows


def _figure(key: str, form: str) -> Callable[[Result], str]:
    return lambda row: form.format(row[key]) if row.get(key) is not None else ""


def _change(row: Result) -> str:
    if "ndcg10_change" not in row:
        return ""
    low, high = row["ndcg10_change_95"]
    return f"{row['ndcg10_change']:+.4f} ({low:+.4f} … {high:+.4f})"


_QUALITY: dict[str, Callable[[Result], str]] = {
    "nDCG@10": _figure("ndcg10", "{:.4f}"),
    "change (95 %)": _change,
    "largest error": _figure("max_abs_error", "{:.0e}"),
    "Spearman": _figure("spearman", "{:.5f}"),
}
_MORE_QUALITY = {
    "Kendall": _figure("kendall", "{:.5f}"),
    "MAP": _figure("map", "{:.4f}"),
    "MRR@10": _figure("mrr10", "{:.4f}"),
    "published": _figure("published_ndcg10", "{:.4f}"),
}


def _parity(results: Sequence[Result]) -> list[list[str]]:
    """One line for each artifact."""
    rows = [["target", "precision", "pairs", "largest / mean error", "Spearman", "size"]]
    for row in (row for result in results for row in result["rows"]):
        _, target, precision = artifact_label(row["artifact"]).split("`")
        errors = (
            f"{row['max_abs_error']:.0e} / {row['mean_abs_error']:.0e}" if row["status"] == "verified" else "unproven"
        )
        spearman = f"{row['spearman']:.5f}" if row["spearman"] is not None else ""
        size = f"{row['size_mib']:.0f} MiB"
        rows.append([f"`{target}`", precision.strip(), str(row["pairs"]), errors, spearman, size])
    return rows


def _profile(results: Sequence[Result]) -> list[list[str]]:
    """Where the time goes, a group of columns for each run."""
    rows = [["part"]]
    least = results[0]["milliseconds"] / 50
    rows += [[part["part"]] for part in results[0]["parts"] if part["milliseconds"] > least]
    for result in results:
        limit = (result["isa_limit"] or "all").replace("_", "-")
        rows[0] += [f"{limit}: share", "of peak"]
        parts = {part["part"]: part for part in result["parts"]}
        for row in rows[1:]:
            part = parts[row[0]]
            of_peak = f"{part['share_of_peak']:.0%}" if part["share_of_peak"] else ""
            row += [f"{part['milliseconds'] / result['milliseconds']:.0%}", of_peak]
    return rows


def _load(results: Sequence[Result]) -> list[list[str]]:
    """One line for each server."""
    rows = [
        ["server", "pairs/s", "of the same in process", "p50 / p95 / p99, all candidates", "… one document",
         "answers", "wrong", "lost", "memory, first to last"]
    ]  # fmt: skip
    names = {"triton": "Triton, gRPC", "http": "`ettin-serve`, HTTP"}
    for result in results:
        for name, row in result["servers"].items():
            mixed, memory = row["mixed"], row["memory_mib"]
            latencies = (mixed["latency_ms"].get(str(count), {}) for count in (result["candidates"], 1))
            times = [" / ".join(f"{value / 1000:.2f}" for value in each.values()) + " s" for each in latencies]
            answers = [mixed[key] + row["full"][key] for key in ("answers", "wrong", "lost")]
            rows.append([
                names[name], number(median(row['pairs_per_s'])), f"{row['share_of_in_process']:.0%}", *times,
                *map(str, answers), f"{memory[0]:.0f} – {memory[-1]:.0f} MiB",
            ])  # fmt: skip
    return rows


def _lengths(results: Sequence[Result]) -> list[list[str]]:
    """One line for each length: pairs per second of every contestant."""
    (result,) = results
    contestants = result["lengths"][0]["contestants"]
    names = [row["name"] for row in contestants]
    rows = [["tokens", *map(label, contestants)]]
    for step in result["lengths"]:
        speeds = {row["name"]: number(row["pairs_per_s"]) for row in step["contestants"] if "pairs_per_s" in row}
        rows.append([str(step["max_length"]), *(speeds.get(name, "–") for name in names)])
    return rows


TABLES: dict[str, Callable[[Sequence[Result]], list[list[str]]]] = {
    "cpu": _cpu,
    "peers": _cpu,
    "throughput": _throughput,
    "shapes": _shapes,
    "quality": _quality,
    "parity": _parity,
    "profile": _profile,
    "load": _load,
    "lengths": _lengths,
}
