"""`ettin-bench quality`, `parity`: how well artifacts rank, and how near they are to the reference."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ettin.artifacts.errors import InputError, MissingDependency, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.bench import published
from ettin.bench.beir import RetrievalSet, read_beir
from ettin.bench.cli_shared import about, show_and_write
from ettin.bench.contest import artifact_name, size_mib
from ettin.bench.hub_sets import NANOBEIR, nanobeir
from ettin.bench.machine import read_result
from ettin.runtimes import load
from ettin.runtimes.commands import console

_REFERENCE = "reference, fp32"
_First = tuple[RetrievalSet, dict[str, list[str]]]


@click.command(
    epilog=console.example_epilog(
        "ettin-bench quality ettin-reranker-17m-v1/openvino-int8 --data scifact --reference my-checkpoint",
        "ettin-bench quality ettin-reranker-17m-v1/openvino-int8 --nanobeir",
    )
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", "folders", multiple=True, type=click.Path(path_type=Path), help="Set in BEIR form; repeatable.")
@click.option("--nanobeir", "nano", is_flag=True, help="The 13 sets and their BM25 ranking from the hub, as published.")
@click.option("--split", default="test", show_default=True, help="test or train.")
@click.option(
    "--run", "run_file", type=click.Path(path_type=Path), help="First stage, as trec_eval's.  [default: BM25]"
)
@click.option("--candidates", "count", default=100, show_default=True, help="Reranked documents a query.")
@click.option(
    "--always-rerank-positives/--found-only",
    "positives",
    default=None,
    help="Also relevant documents that the first stage missed.  [default: with --nanobeir, as published]",
)
@click.option("--queries", type=click.IntRange(1), help="Queries of a set, at most.  [default: all]")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The checkpoint's folder: compare with gold. An earlier result (.json): with its reference's nDCG@10.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def quality(
    artifacts: tuple[Path, ...], folders: tuple[Path, ...], nano: bool, split: str, run_file: Path | None, count: int,
    positives: bool | None, queries: int | None, max_length: int, reference: Path | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Quality of reranking a first stage's candidates; with --reference beside PyTorch's in fp32, pair by pair.

    nDCG@10, MAP and MRR@10; the change of nDCG@10 comes with its 95% interval, a paired bootstrap over queries. Of
    several sets, the mean; beside NanoBEIR's stands the published one.
    """
    if bool(folders) == nano:
        raise UsageError("which sets? Name them with --data DIR, or take --nanobeir")
    if run_file and len(folders) != 1:
        raise UsageError("--run ranks the queries of one set: name that one with --data DIR")
    try:
        from ettin.bench.quality import first_stage_ndcg, mean_rows, with_positives
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench quality", str(error.name), "bench") from None
    always = nano if positives is None else positives
    settings: dict[str, Any] = {"candidates": count, "max_length": max_length, "always_rerank_positives": always}
    sets: list[dict[str, Any]] = []
    for data, found in _nano(count, queries) if nano else _folders(folders, split, run_file, count, queries):
        first_stage = first_stage_ndcg(data, found)
        candidates = with_positives(data, found) if always else found
        rows = _rows(artifacts, data, candidates, settings, reference)
        figures = {"data": data.name, "queries": len(candidates), "first_stage_ndcg10": first_stage}
        sets.append({**settings, **figures, "rows": rows})
    result: dict[str, Any] = sets[0]
    if len(sets) > 1:
        means = mean_rows(sets)
        if nano:
            for row, path in zip(means[-len(artifacts) :], artifacts, strict=True):
                row["published_ndcg10"] = _published(path)
        name = "NanoBEIR" if nano else " + ".join(each["data"] for each in sets)
        total = sum(each["queries"] for each in sets)
        mean = sum(each["first_stage_ndcg10"] for each in sets) / len(sets)
        result = {**settings, "data": name, "queries": total, "first_stage_ndcg10": mean, "rows": means, "sets": sets}
    show_and_write(json_path, "quality", result)


def _folders(
    folders: tuple[Path, ...], split: str, run_file: Path | None, count: int, queries: int | None
) -> Iterator[_First]:
    from ettin.bench.first_stage import bm25_candidates, run_candidates

    for folder in folders:
        data = read_beir(folder, split)
        with console.step(f"{data.name}: find candidates"):
            if run_file:
                found = run_candidates(data, run_file, count, queries)
            else:
                found = bm25_candidates(data, count, queries)
        yield data, found


def _nano(count: int, queries: int | None) -> Iterator[_First]:
    for name in NANOBEIR:
        with console.step(f"{name}: fetch"):
            data, ranked = nanobeir(name)
        yield data, {query: found[:count] for query, found in list(ranked.items())[:queries]}


def _rows(
    artifacts: tuple[Path, ...], data: RetrievalSet, candidates: Mapping[str, list[str]], settings: Mapping[str, Any],
    reference: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    from ettin.bench.quality import Quality, rerank_quality, row

    rows: list[dict[str, Any]] = []
    gold: Quality | Mapping[str, float] | None = None
    if reference and reference.suffix == ".json":
        rows.append(_earlier(reference, data.name, candidates, settings))
        gold = rows[0]["ndcg10_by_query"]
    elif reference:
        with console.step(f"{data.name}: rerank with the reference"):
            gold = rerank_quality(data, candidates, _reference(reference, settings["max_length"]))
        rows.append({"artifact": _REFERENCE, **row(gold, None)})
    for path in artifacts:
        with load(path) as runtime, console.step(f"{data.name}: rerank with {path}"):
            predict = functools.partial(runtime.predict, max_length=settings["max_length"], activation_fn="identity")
            rows.append({**about(runtime), **row(rerank_quality(data, candidates, predict), gold)})
    return rows


def _earlier(file: Path, data: str, candidates: Mapping[str, list[str]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's figures of an earlier result; it must be of the same pairs."""
    result = read_result(file)["result"]
    for found in result.get("sets", [result]):
        same = found.get("data") == data and all(found.get(key, False) == value for key, value in settings.items())
        for row in found.get("rows", []) if same else []:
            if row["artifact"] == _REFERENCE and row["ndcg10_by_query"].keys() == candidates.keys():
                return dict(row)
    wanted = ", ".join(f"{key} {value}" for key, value in settings.items())
    raise InputError(
        f"{file}: no reference's quality on {data} with {len(candidates)} queries, {wanted}. "
        "Name the checkpoint: --reference DIR"
    )


def _reference(folder: Path, max_length: int) -> Any:
    """Gold's `predict`, raw logits."""
    import torch

    from ettin.export.reference import load_gold
    from ettin.export.source.checkpoint import read_checkpoint

    model = load_gold(read_checkpoint(folder))
    model.max_seq_length = max_length
    return lambda pairs: model.predict([list(pair) for pair in pairs], batch_size=8, activation_fn=torch.nn.Identity())


def _published(artifact: Path) -> float | None:
    """The release's own mean, if these are its weights."""
    source = Manifest.read(artifact).source
    size = source.id.rsplit("/", 1)[-1].removeprefix("ettin-reranker-").removesuffix("-v1")
    if source.weights == "random" or size not in published.SIZES:
        return None
    return published.NANOBEIR_NDCG10[published.SIZES.index(size)]


@click.command(epilog=console.example_epilog("ettin-bench parity ettin-reranker-17m-v1/*"))
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def parity(artifacts: tuple[Path, ...], json_path: Path | None) -> None:
    """What was proven of artifacts at their export, and their size: as their manifests say."""
    rows = []
    for path in artifacts:
        made = Manifest.read(path)
        proven = made.parity.model_dump(mode="json", exclude={"reference", "rule"})
        source = {"weights": made.source.weights, "weights_sha256": made.source.weights_sha256}
        rows.append({"artifact": artifact_name(path), **source, **proven, "size_mib": size_mib(path)})
    name = ", ".join(sorted({Manifest.read(path).name for path in artifacts}))
    show_and_write(json_path, "parity", {"data": name, "rows": rows})
