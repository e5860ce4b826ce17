"""One page of all results: tables and plots, in one file that needs nothing else."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from ettin.artifacts.errors import InputError
from ettin.bench import plots, published
from ettin.bench.machine import read_result
from ettin.bench.tables import TABLES

Record = dict[str, Any]


@dataclass
class Part:
    """A piece of a section: one or more results.

    Args:
        title: what was measured.
        records: the results.
        pictures: figures and captions.
        table: rows, the first is the head; empty: none.
    """

    title: str
    records: Sequence[Record]
    pictures: list[tuple[Figure, str]] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)


_SECTIONS: dict[str, tuple[str, str]] = {
    "trade": ("Throughput and quality", "Each point is a size. Dashed: figures published with the release (PyTorch). "
              "Solid: pairs per second measured here (the fastest of several runs) with weights of the same shape, at "
              "the quality published for the size; what int8 changes in ranking is measured below, on stand-ins."),
    "throughput": ("Throughput at the best batch size", "The release's method: batches doubled until that brings "
                   "nothing, then passes in turns, a process each. Of peak: the published model's work in that time, "
                   "against the machine's fastest matrix product of that precision."),
    "cpu": ("Throughput with default settings", "Tokenising included, natural lengths, a process each, in turns."),
    "peers": ("What a user would pick instead", "Each in an environment of its own, same pairs, in turns."),
    "lengths": ("Length scaling", "Every pair filled to the same number of tokens."),
    "load": ("Under load", "Many clients at the same time; every score was compared with that pair scored alone."),
    "quality": ("Ranking quality", "Reranking BM25's candidates; changes with paired bootstrap intervals (95 %)."),
    "parity": ("Parity at export", "Every artifact against the reference, on the pairs that it was proven with."),
    "profile": ("Where the time goes", "One batch on one thread."),
    "gpu": ("GPUs", "Parity on the card, then the release's settings and ours."),
}  # fmt: skip


def read_results(paths: Sequence[Path]) -> list[Record]:
    """Results, folders searched, in order of their names; those of kinds that a page has no place for are left out.

    Raises:
        InputError: not a result, or none at all.
    """
    found = sorted(file for path in paths for file in (path.rglob("*.json") if path.is_dir() else [path]))
    records = []
    for file in found:
        record = read_result(file)
        if record["kind"] in _SECTIONS:
            records.append({**record, "file": file.name})
    if not records:
        raise InputError(f"{', '.join(map(str, paths))}: no results of ettin-bench. Make one: ettin-bench cpu --help")
    return records


def page(records: Sequence[Record]) -> str:
    """The HTML page."""
    sections = []
    for key, (title, about) in _SECTIONS.items():
        parts = _parts(key, records)
        if parts:
            shown = [_shown(part, f"{key}-{number}") for number, part in enumerate(parts)]
            sections.append({"key": key, "title": title, "about": about, "parts": shown})
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        files("ettin.bench").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    machines = sorted({_machine(record) for record in records})
    return template.render(sections=sections, machines=machines, count=len(records)) + "\n"


def write_pictures(records: Sequence[Record], folder: Path) -> list[Path]:
    """The plots as SVG files, for a README."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key in _SECTIONS:
        for number, part in enumerate(_parts(key, records)):
            for at, (figure, _) in enumerate(part.pictures):
                file = folder / f"{key}-{part.records[0]['file'].removesuffix('.json')}-{at}.svg"
                if key == "trade":
                    file = folder / f"trade-{number}.svg"
                file.write_text(_svg(figure, file.stem), encoding="utf-8")
                written.append(file)
    return written


def _parts(key: str, records: Sequence[Record]) -> list[Part]:
    """Of one section."""
    kinds = ("cpu", "throughput") if key == "trade" else (key,)
    return _PARTS[key]([record for record in records if record["kind"] in kinds])


def _shown(part: Part, name: str) -> dict[str, Any]:
    sources = [
        f"{record['file']}\n$ {record['command']}\n{_machine(record)}, {_versions(record)}" for record in part.records
    ]
    return {
        "title": part.title,
        "machines": sorted({_machine(record) for record in part.records}),
        "pictures": [(_svg(figure, f"{name}-{at}"), text) for at, (figure, text) in enumerate(part.pictures)],
        "table": [[cell.replace("`", "") for cell in row] for row in part.table],
        "sources": sources,
    }


def _svg(figure: Figure, name: str) -> str:
    """The same for the same results; the name, different for every figure of a page, keeps their ids apart."""
    target = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def _machine(record: Record) -> str:
    machine = record["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cpus_usable']} cores"
    isa = machine.get("isa") or []
    return f"{where}{', AMX' if 'amx_int8' in isa else ''}"


def _versions(record: Record) -> str:
    versions = record["machine"].get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _setting(result: Record) -> str:
    words = [str(result.get("data", "")), f"{result['pairs']} pairs" if "pairs" in result else ""]
    words += [f"max_length {result['max_length']}" if "max_length" in result else ""]
    limit = result.get("isa", "all")
    words += ["" if limit == "all" else f"limited to {limit.upper().replace('_', '-')}"]
    words += ["random weights" if result.get("weights") == "random" else "trained weights"]
    return ", ".join(filter(None, words))


def _trade(records: Sequence[Record]) -> list[Part]:
    measured = [record for record in records if not record["result"].get("filled")]
    return [Part("By size", measured, [(plots.trade(measured), "")])] if measured else []


def _speeds(records: Sequence[Record]) -> list[Part]:
    parts = []
    for record in sorted(records, key=_size):
        result = record["result"]
        name = next((row["name"].split("/")[0] for row in result["contestants"] if "/" in row["name"]), "")
        pictures = [(plots.speeds(result), ""), (plots.memory(result), "")]
        if any("probed" in row.get("batch", {}) for row in result["contestants"]):
            pictures += [(plots.requests(result), ""), (plots.probes(result), "What a larger batch brings.")]
        table = TABLES[record["kind"]]([result])
        parts.append(Part(f"{name}: {_setting(result)}", [record], pictures, table))
    return parts


def _size(record: Record) -> int:
    """Released sizes in their order; what is none, before them."""
    name = next((row["name"] for row in record["result"]["contestants"] if "/" in row["name"]), "")
    size = name.split("/")[0].split("-")[0]
    return published.SIZES.index(size) if size in published.SIZES else -1


def _lengths(records: Sequence[Record]) -> list[Part]:
    return [
        Part(f"{record['result']['name']}: {_setting(record['result'])}", [record],
             [(plots.lengths(record["result"]), "")], TABLES["lengths"]([record["result"]]))
        for record in records
    ]  # fmt: skip


def _load(records: Sequence[Record]) -> list[Part]:
    return [
        Part(f"{record['result']['artifact']}: {_setting(record['result'])}", [record],
             [(plots.latencies(record["result"]), "Dots: median, 95th and 99th percentile.")],
             TABLES["load"]([record["result"]]))
        for record in records
    ]  # fmt: skip


def _plain(kind: str) -> Callable[[Sequence[Record]], list[Part]]:
    """A table for each result."""

    def parts(records: Sequence[Record]) -> list[Part]:
        return [Part(_title(record["result"]), [record], table=TABLES[kind]([record["result"]])) for record in records]

    return parts


def _title(result: Record) -> str:
    return ", ".join(filter(None, (str(result.get("artifact", "")), str(result.get("data", ""))))) or "All"


def _gpu(records: Sequence[Record]) -> list[Part]:
    parts = []
    for record in records:
        parity = record["result"].get("parity")
        if parity:
            rows = [["what", "largest error", "mean error", "of FlashAttention-2's"]]
            rows += [
                [name, f"{row['max_abs_error']:.1e}", f"{row['mean_abs_error']:.1e}", f"{row['of_reference']:.2f}"]
                for name, row in parity["rows"].items()
            ]
            parts.append(Part(f"Parity, {parity['weights']}", [record], table=rows))
        for size, found in record["result"]["sizes"].items():
            rows = [["setting", "pairs/s", "batch", "peak memory, MiB"]]
            rows += [
                [name, f"{row['pairs_per_s']:.0f}" if "pairs_per_s" in row else row["stopped"],
                 str(row.get("batch", "")), str(row.get("peak_gpu_mib") or "")]
                for name, row in found["rows"].items()
            ]  # fmt: skip
            parts.append(Part(f"{size}, {found['weights']} weights", [record], table=rows))
    return parts


_PARTS: dict[str, Callable[[Sequence[Record]], list[Part]]] = {
    "trade": _trade,
    "throughput": _speeds,
    "cpu": _speeds,
    "peers": _speeds,
    "lengths": _lengths,
    "load": _load,
    "quality": _plain("quality"),
    "parity": _plain("parity"),
    "profile": _plain("profile"),
    "gpu": _gpu,
}
