"""Results as pictures: matplotlib figures, one idea each."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ettin.bench import published
from ettin.bench.tables import label, number

Result = Mapping[str, Any]

# Okabe and Ito's colours, which all kinds of eyes tell apart: ours first, peers grey.
_OURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
_PEERS = ("#444444", "#777777", "#AAAAAA", "#CCCCCC")
_SERVERS = {"triton": "Triton", "http": "ettin-serve"}
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "axes.axisbelow": True, "svg.fonttype": "none", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def _figure(width: float = 7.2, height: float = 3.6) -> tuple[Figure, Any]:
    """Called within the style, which what is drawn later needs, too."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _is_ours(name: str) -> bool:
    return "/" in name


def _colours(names: Sequence[str]) -> dict[str, str]:
    ours = [name for name in names if _is_ours(name)]
    peers = [name for name in names if not _is_ours(name)]
    found = {name: _OURS[at % len(_OURS)] for at, name in enumerate(ours)}
    return found | {name: _PEERS[at % len(_PEERS)] for at, name in enumerate(peers)}


def plain(contestant: Result) -> str:
    """What a contestant is called, without Markdown."""
    return label(contestant).replace("`", "")


def speeds(result: Result) -> Figure:
    """Pairs per second of every contestant of one run, with each round as a dot."""
    rounds = {
        row["name"]: [result["pairs"] / seconds for seconds in row["passes_s"]]
        for row in result["contestants"]
        if "pairs_per_s" in row
    }
    return _bars(result, "pairs_per_s", number, "pairs per second (bars: median, dots: rounds)", rounds)


def probes(result: Result) -> Figure:
    """Speed by batch size of every contestant, as share of its best."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        tokens = result["tokens_per_pair"]
        colours = _colours([each["name"] for each in result["contestants"]])
        for row in result["contestants"]:
            probed = row["batch"].get("probed")
            if not probed:
                continue
            scale = 1 if row["batch"]["unit"] == "tokens" else tokens
            best = max(probed.values())
            sizes = [int(size) * scale for size in probed]
            shares = [speed / best for speed in probed.values()]
            axes.plot(sizes, shares, marker="o", markersize=3.5, color=colours[row["name"]], label=plain(row))
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("tokens of a batch (PyTorch: pairs × mean length)")
        axes.set_ylabel("share of the best speed")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def requests(result: Result) -> Figure:
    """Share of the latency requests that were answered by then, of every contestant of one run."""
    rows = [each for each in result["contestants"] if each.get("latencies_ms")]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        colours = _colours([each["name"] for each in rows])
        for row in rows:
            axes.ecdf(row["latencies_ms"], color=colours[row["name"]], label=plain(row))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"milliseconds for one query with {result['candidates']} documents")
        axes.set_ylabel("share of the requests")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def memory(result: Result) -> Figure:
    """Peak memory of every contestant of one run."""
    return _bars(result, "peak_rss_mib", "{:.0f}".format, "peak memory of the process, MiB", {})


def _bars(
    result: Result, key: str, text: Callable[[float], str], axis: str, dots: Mapping[str, Sequence[float]]
) -> Figure:
    """One figure of every contestant that has it, the first at the top."""
    rows = [each for each in result["contestants"] if key in each][::-1]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height=0.9 + 0.3 * len(rows))
        colours = _colours([each["name"] for each in rows[::-1]])
        for at, row in enumerate(rows):
            axes.barh(at, row[key], color=colours[row["name"]], height=0.7)
            marks = dots.get(row["name"], [])
            if marks:
                axes.plot(marks, [at] * len(marks), ".", color="black", markersize=3)
            end = max(marks, default=row[key])
            axes.annotate(text(row[key]), (end, at), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [plain(each) for each in rows])
        axes.set_xlabel(axis)
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
    return figure


def lengths(result: Result) -> Figure:
    """Tokens per second by length, of every contestant."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step in result["lengths"]:
        for row in step["contestants"]:
            if "pairs_per_s" in row:
                series[row["name"]].append((step["max_length"], row["pairs_per_s"] * step["max_length"]))
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height=4.0)
        colours = _colours(list(series))
        for name, points in series.items():
            shown = plain({"name": name})
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colours[name], label=shown)
        axes.set_xscale("log", base=2)
        ticks = [step["max_length"] for step in result["lengths"]]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of every pair")
        axes.set_ylabel("tokens per second")
        axes.legend()
    return figure


def trade(records: Sequence[Result]) -> Figure:
    """Speed against quality by size: published curves, and measured speeds at the published quality of their size."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height=4.8)
        for (name, values), colour in zip(published.PAIRS_PER_S.items(), _PEERS, strict=False):
            axes.plot(
                values, published.NANOBEIR_NDCG10, "--o", color=colour, markersize=3.5, label=f"published: {name}"
            )
        groups: dict[str, dict[int, float]] = defaultdict(dict)
        for record in records:
            result, cpus = record["result"], record["machine"]["cpus_usable"]
            for row in result["contestants"]:
                size = row["name"].split("/")[0].removesuffix("-lexical").removesuffix("-random")
                if "pairs_per_s" in row and size in published.SIZES and row["name"].endswith("openvino-int8"):
                    limit = (
                        "" if result.get("isa", "all") == "all" else f", {result['isa'].upper().replace('_', '-')} only"
                    )
                    points = groups[f"openvino int8, measured on {cpus} cores{limit}"]
                    at = published.SIZES.index(size)
                    points[at] = max(points.get(at, 0.0), row["pairs_per_s"])
        for (name, points), colour in zip(groups.items(), _OURS, strict=False):
            order = sorted(points)
            qualities = [published.NANOBEIR_NDCG10[at] for at in order]
            axes.plot([points[at] for at in order], qualities, "-o", color=colour, label=name)
        for size, speed, quality in zip(
            published.SIZES, published.PAIRS_PER_S["i7-13700K, fp32"], published.NANOBEIR_NDCG10, strict=True
        ):
            axes.annotate(size, (speed, quality), (-6, 4), textcoords="offset points", ha="right", color="#666666")
        axes.set_xscale("log")
        axes.set_xlabel("pairs per second")
        axes.set_ylabel("published NanoBEIR mean nDCG@10 of the size")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def latencies(result: Result) -> Figure:
    """Time to answer under mixed load, by server and number of documents."""
    groups = [
        (f"{_SERVERS[server]}, {count} document{'s' if count != '1' else ''}", times)
        for server, row in result["servers"].items()
        for count, times in row["mixed"]["latency_ms"].items()
    ][::-1]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height=0.9 + 0.35 * len(groups))
        for at, (_, times) in enumerate(groups):
            axes.plot([times["p50"] / 1000, times["p99"] / 1000], [at, at], color="#BBBBBB", linewidth=5)
            for key, colour in (("p50", _OURS[0]), ("p95", _OURS[4]), ("p99", _OURS[2])):
                axes.plot(times[key] / 1000, at, "o", color=colour, label=key if at == 0 else None)
        axes.set_yticks(range(len(groups)), [name for name, _ in groups])
        axes.set_xlim(left=0)
        axes.set_xlabel(f"seconds, {result['clients']} clients at the same time")
        axes.set_ylim(-0.6, len(groups) - 0.4)
        figure.legend(loc="outside upper right", ncols=3)
        axes.grid(visible=False, axis="y")
    return figure
