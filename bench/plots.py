"""Results as pictures: the plots that Markdown files show, as SVG."""

import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ettin.artifacts.errors import InputError
from ettin.artifacts.writing import write_file
from ettin.bench.machine import read_result
from ettin.bench.report import NANOBEIR_NDCG10, PUBLISHED_PAIRS_PER_S, label

Record = dict[str, Any]

# Okabe and Ito's colours, which all kinds of eyes tell apart, for ours; greys for others.
_OURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
_OTHERS = ("#444444", "#777777", "#AAAAAA", "#CCCCCC")
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "axes.axisbelow": True, "svg.fonttype": "none", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
_SHOWN = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def draw_shown(file: Path) -> None:
    """Draws those plots of `PLOTS` that a Markdown file shows, from the results in the folder above the picture's."""
    for name in _SHOWN.findall(file.read_text(encoding="utf-8")):
        picture = (file.parent / name).resolve()  # docs/plots is a link
        if picture.name in PLOTS:
            records = [read_result(path) for path in sorted(picture.parents[1].glob("*.json"))]
            target = io.StringIO()
            with mpl.rc_context({**_STYLE, "svg.hashsalt": picture.stem}):  # the same text for the same results
                figure = PLOTS[picture.name](records)
                figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
            text = target.getvalue()
            write_file(picture, text[text.index("<svg") :].encode())


def throughput_quality(records: Sequence[Record]) -> Figure:
    """Speed against quality by size: published curves, and the fastest int8 runs at the quality of their sizes."""
    sizes, qualities = list(NANOBEIR_NDCG10), list(NANOBEIR_NDCG10.values())
    figure = Figure(figsize=(7.2, 4.8))
    axes = figure.subplots()
    for (name, speeds), colour in zip(PUBLISHED_PAIRS_PER_S.items(), _OTHERS, strict=False):
        axes.plot(speeds, qualities, "--o", color=colour, markersize=3.5, label=f"published: {name}")
    for size, x, y in zip(sizes, PUBLISHED_PAIRS_PER_S["i7-13700K, fp32"], qualities, strict=True):
        axes.annotate(size, (x, y), (-6, 4), textcoords="offset points", ha="right", color="#666666")
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for record in (record for record in records if record["kind"] in ("cpu", "throughput", "speed")):
        result = record["result"]
        isa = result.get("isa", "all")
        limit = "" if isa == "all" else f", {isa.upper().replace('_', '-')} only"
        group = groups[f"openvino int8, measured on {record['machine']['cpus_usable']} cores{limit}"]
        for row in [] if result.get("filled") else result.get("contestants", []):
            size = row["name"].split("/")[0].split("-")[0]
            if "pairs_per_s" in row and size in sizes and row["name"].endswith("openvino-int8"):
                group[size] = max(group.get(size, 0.0), row["pairs_per_s"])
    for (name, group), colour in zip(groups.items(), _OURS, strict=False):
        measured = [size for size in sizes if size in group]
        places = [group[size] for size in measured], [NANOBEIR_NDCG10[size] for size in measured]
        axes.plot(*places, "-o", color=colour, label=name)
    axes.set(xscale="log", xlabel="pairs per second", ylabel="published NanoBEIR mean nDCG@10 of the size")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def lengths(records: Sequence[Record]) -> Figure:
    """Tokens per second by length, of every contestant of the latest run."""
    found = [record["result"]["lengths"] for record in records if "lengths" in record["result"]]
    if not found:
        raise InputError("a plot of lengths has no result. Make one: ettin-bench speed --length")
    steps = found[-1]
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step in steps:
        for row in step["contestants"]:
            if "pairs_per_s" in row:
                series[row["name"]].append((step["max_length"], row["pairs_per_s"] * step["max_length"]))
    figure = Figure(figsize=(7.2, 4.0))
    axes = figure.subplots()
    colours = {True: cycle(_OURS), False: cycle(_OTHERS)}
    for name, points in series.items():
        colour, shown = next(colours["/" in name]), label(name).replace("`", "")
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colour, label=shown)
    axes.set_xscale("log", base=2)
    axes.set_xticks([step["max_length"] for step in steps], [str(step["max_length"]) for step in steps])
    axes.minorticks_off()
    axes.set(ylim=(0, None), xlabel="tokens of every pair", ylabel="tokens per second")
    axes.legend()
    return figure


# By the name of the picture.
PLOTS: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "throughput-quality.svg": throughput_quality,
    "lengths.svg": lengths,
}
