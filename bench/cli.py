"""`ettin-bench`: measures artifacts on this machine."""

import json
import random
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import click

from ettin.artifacts.errors import MissingDependency
from ettin.artifacts.metrics import score_error
from ettin.bench.beir import RetrievalSet, read_beir
from ettin.bench.cpu import ISAS, NOTES, compare, contestants, result
from ettin.bench.machine import machine
from ettin.bench.quality import first_stage_ndcg, rerank_quality
from ettin.bench.throughput import pairs_per_s
from ettin.runtimes import Runtime, console, load

_SCHEMA = 1


@click.group()
def command() -> None:
    """Measure artifacts: speed, and ranking quality."""


@command.command(epilog=console.example_epilog("ettin-bench throughput ettin-reranker-demo/openvino-int8"))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own passages]")
@click.option("--pairs", "count", default=400, show_default=True, help="Pairs in a pass.")
@click.option("--passes", default=3, show_default=True, help="Timed passes; the median is reported.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def throughput(
    artifact: Path, data: Path | None, count: int, passes: int, max_length: int, threads: int | None,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Pairs per second, tokenising included: median of several passes over the same pairs."""
    pairs = _pairs(data, count)
    with load(artifact, threads=threads) as runtime:
        speeds = pairs_per_s(runtime, pairs, min(max_length, runtime.max_length), passes)
        text = f"{median(speeds):.1f} pairs/s (median of {passes}, best {max(speeds):.1f}; {len(pairs)} pairs)"
        click.echo(f"{runtime.description}: {text}")
        result = {"pairs": len(pairs), "max_length": max_length, "pairs_per_s": speeds, "median": median(speeds)}
        _write(
            json_path, "throughput", {**_artifact(runtime), "data": str(data.name if data else "passages"), **result}
        )


@command.command(
    epilog=console.example_epilog("ettin-bench quality ettin-reranker-17m-v1/openvino-int8 --data scifact")
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Retrieval set in BEIR form.")
@click.option("--split", default="test", show_default=True, help="test or train.")
@click.option("--candidates", "count", default=100, show_default=True, help="Reranked documents a query, by BM25.")
@click.option("--queries", type=click.IntRange(1), help="Queries, at most.  [default: all]")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--reference", type=click.Path(path_type=Path), help="The checkpoint's folder: compare with gold.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def quality(
    artifact: Path, data: Path, split: str, count: int, queries: int | None, max_length: int, reference: Path | None,
    json_path: Path | None,
) -> None:  # fmt: skip
    """NDCG@10 of reranking BM25's candidates; with --reference beside PyTorch's, pair by pair."""
    try:
        from ettin.bench.first_stage import bm25_candidates
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench quality", str(error.name), "bench") from None
    rows = read_beir(data, split)
    with console.step("find candidates"):
        candidates = bm25_candidates(rows, count, queries)
    result: dict[str, Any] = {"data": rows.name, "queries": len(candidates), "candidates": count}
    result["first_stage_ndcg10"] = first_stage_ndcg(rows, candidates)
    with load(artifact) as runtime, console.step("rerank"):
        ours = rerank_quality(
            rows, candidates, lambda pairs: runtime.predict(pairs, max_length=max_length, activation_fn="identity")
        )
        result |= _artifact(runtime)
    result |= {"max_length": max_length, "ndcg10": ours.ndcg10, "seconds": ours.seconds}
    line = f"{result['runtime']}: nDCG@10 {ours.ndcg10:.4f} (first stage {result['first_stage_ndcg10']:.4f})"
    if reference:
        with console.step("rerank with the reference"):
            gold = rerank_quality(rows, candidates, _reference(reference, max_length))
        delta = score_error(ours.scores, gold.scores)
        result |= {
            "reference_ndcg10": gold.ndcg10,
            "reference_seconds": gold.seconds,
            "max_abs_error": delta.max_abs,
            "mean_abs_error": delta.mean_abs,
            "spearman": delta.spearman,
        }
        line += f", reference {gold.ndcg10:.4f}; max |Δ| {delta.max_abs:.2e} over {len(gold.scores)} pairs"
    click.echo(line)
    _write(json_path, "quality", result)


@command.command(
    epilog=console.example_epilog(
        "ettin-bench cpu my-model/openvino-int8 --checkpoint my-model --peer st-fp32 --peer st-bf16 --data squad"
    )
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the artifacts were made from, for the peers.")
@click.option("--peer", "peers", multiple=True, help="st-fp32, st-bf16, traced or traced-int8; may be repeated.")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own passages]")
@click.option("--pairs", "count", default=400, show_default=True, help="Pairs in a pass.")
@click.option("--rounds", default=5, show_default=True, help="Interleaved passes of each contestant.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--isa", type=click.Choice(list(ISAS)), default="all", show_default=True, help="Limit for everybody.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def cpu(
    artifacts: tuple[Path, ...], checkpoint: Path | None, peers: tuple[str, ...], data: Path | None, count: int,
    rounds: int, max_length: int, isa: str, json_path: Path | None,
) -> None:  # fmt: skip
    """Artifacts against what a user would run instead: same pairs, interleaved rounds, a process each."""
    entries = contestants(artifacts, checkpoint, peers)
    pairs = _pairs(data, count)
    with console.step(f"{rounds} rounds of {len(pairs)} pairs"):
        compare(entries, pairs, max_length=max_length, rounds=rounds, isa=isa)
    results = [result(entry, len(pairs)) for entry in entries]
    speeds = {each["name"]: each["pairs_per_s"] for each in results if "pairs_per_s" in each}
    rows = []
    for each in results:
        if "pairs_per_s" not in each:
            rows.append([each["name"], "–", "–", "–", "–", "–", each["problem"]])
            continue
        ratio = f"{each['pairs_per_s'] / speeds['st-fp32']:.2f}" if "st-fp32" in speeds else "–"
        note = f"{each['nan']} scores are NaN" if each["nan"] else each["description"]
        rows.append([
            each["name"], f"{each['pairs_per_s']:.1f}", ratio, f"{each['latency_100_p50_ms']:.0f}",
            f"{each['peak_rss_mib']:.0f}", f"{each['load_s']:.2f}", note,
        ])  # fmt: skip
    console.table(
        rows, ["contestant", "pairs/s", "× st-fp32", "100 candidates p50 ms", "peak MiB", "load s", "what ran"]
    )
    settings = {
        "data": data.name if data else "passages",
        "pairs": len(pairs),
        "rounds": rounds,
        "max_length": max_length,
    }
    _write(json_path, "cpu", {**settings, "isa": isa, "isa_note": NOTES[isa], "contestants": results})


def _reference(folder: Path, max_length: int) -> Any:
    """Gold's `predict`, raw logits."""
    import torch

    from ettin.export.checkpoint import read_checkpoint
    from ettin.export.gold import load_gold

    model = load_gold(read_checkpoint(folder))
    model.max_seq_length = max_length
    return lambda pairs: model.predict([list(pair) for pair in pairs], activation_fn=torch.nn.Identity())


def _pairs(data: Path | None, count: int) -> list[tuple[str, str]]:
    """Judged pairs of the set in a fixed random order, or the project's own passages, as often as it takes."""
    if data is None:
        from ettin.export.proof_pairs import natural_pairs

        found = [(pair.query, pair.document) for pair in natural_pairs()]
    else:
        rows: RetrievalSet = read_beir(data)
        found = [(rows.queries[query], rows.documents[each]) for query, judged in rows.qrels.items() for each in judged]
        random.Random(0).shuffle(found)  # noqa: S311
    return (found * (-(-count // len(found))))[:count]


def _artifact(runtime: Runtime) -> dict[str, Any]:
    made = runtime.manifest
    return {
        "artifact": f"{made.name}/{made.target}-{made.precision}",
        "weights": made.source.weights,
        "weights_sha256": made.source.weights_sha256,
        "runtime": runtime.description,
    }


def _write(path: Path | None, kind: str, result: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    command_line = shlex.join(["ettin-bench", *sys.argv[1:]])
    content = {"schema": _SCHEMA, "kind": kind, "command": command_line, "machine": machine(), "result": result}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
