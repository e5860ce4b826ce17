"""`ettin-bench`: measures artifacts on this machine."""

import functools
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ettin.artifacts.errors import MissingDependency, UsageError
from ettin.artifacts.metrics import score_error
from ettin.bench.beir import read_beir
from ettin.bench.bundle import assemble
from ettin.bench.cli_cpu import cpu, everything, lengths
from ettin.bench.cli_results import compare_results, report, tables
from ettin.bench.cli_shared import about, show_and_write, write
from ettin.bench.texts import pairs_to_score
from ettin.bench.throughput import pairs_per_s
from ettin.export.sizes import DEMO_FOLDER
from ettin.runtimes import console, load
from ettin.runtimes.batch import Batch
from ettin.runtimes.cpu import isa_limit

if TYPE_CHECKING:
    from ettin.bench.quality import Quality


@click.group()
def command() -> None:
    """Measure artifacts: speed, and ranking quality."""


@command.command(epilog=console.example_epilog("ettin-bench throughput ettin-reranker-demo/openvino-int8"))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own passages]")
@click.option("--pairs", "count", default=400, show_default=True, help="Pairs in a pass.")
@click.option("--passes", default=3, show_default=True, help="Timed passes; the median is reported.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one a core]")
@click.option("--streams", type=click.IntRange(1), help="Batches at a time.  [default: one a thread]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def throughput(
    artifact: Path, data: Path | None, count: int, passes: int, max_length: int, threads: int | None,
    streams: int | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Pairs per second, tokenising included: median of several passes over the same pairs."""
    pairs = pairs_to_score(data, count)
    with load(artifact, threads=threads, streams=streams) as runtime:
        speeds = pairs_per_s(runtime, pairs, min(max_length, runtime.max_length), passes)
        text = f"{median(speeds):.1f} pairs/s (median of {passes}, best {max(speeds):.1f}; {len(pairs)} pairs)"
        click.echo(f"{runtime.description}: {text}")
        result = {"pairs": len(pairs), "max_length": max_length, "pairs_per_s": speeds, "median": median(speeds)}
        write(json_path, "throughput", {**about(runtime), "data": str(data.name if data else "passages"), **result})


@command.command(
    epilog=console.example_epilog("ettin-bench quality ettin-reranker-17m-v1/openvino-int8 --data scifact")
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Retrieval set in BEIR form.")
@click.option("--split", default="test", show_default=True, help="test or train.")
@click.option("--candidates", "count", default=100, show_default=True, help="Reranked documents a query, by BM25.")
@click.option("--queries", type=click.IntRange(1), help="Queries, at most.  [default: all]")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--reference", type=click.Path(path_type=Path), help="The checkpoint's folder: compare with gold.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def quality(
    artifacts: tuple[Path, ...], data: Path, split: str, count: int, queries: int | None, max_length: int,
    reference: Path | None, json_path: Path | None,
) -> None:  # fmt: skip
    """NDCG@10 of reranking BM25's candidates; with --reference beside PyTorch's in fp32, pair by pair.

    The change of nDCG@10 comes with its 95% interval, a paired bootstrap over queries.
    """
    try:
        from ettin.bench.first_stage import bm25_candidates
        from ettin.bench.quality import Quality, change, first_stage_ndcg, kendall, rerank_quality
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench quality", str(error.name), "bench") from None
    rows = read_beir(data, split)
    with console.step("find candidates"):
        candidates = bm25_candidates(rows, count, queries)
    first_stage = first_stage_ndcg(rows, candidates)
    results: list[dict[str, Any]] = []
    gold: Quality | None = None
    if reference:
        with console.step("rerank with the reference"):
            gold = rerank_quality(rows, candidates, _reference(reference, max_length))
        results.append({"artifact": "reference, fp32", **_means(gold)})
    for path in artifacts:
        with load(path) as runtime, console.step(f"rerank with {path}"):
            predict = functools.partial(runtime.predict, max_length=max_length, activation_fn="identity")
            found = rerank_quality(rows, candidates, predict)
            results.append({**about(runtime), **_means(found)})
        if gold:
            delta = score_error(found.scores, gold.scores)
            moved, low, high = change(found, gold)
            tau = kendall(found.scores, gold.scores)
            results[-1] |= {"ndcg10_change": moved, "ndcg10_change_95": [low, high], **delta.figures(), "kendall": tau}
    settings = {"data": rows.name, "queries": len(candidates), "candidates": count, "max_length": max_length}
    show_and_write(json_path, "quality", {**settings, "first_stage_ndcg10": first_stage, "rows": results})


@command.command(epilog=console.example_epilog("ettin-bench profile ettin-reranker-17m-v1/openvino-int8"))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--pairs", "count", default=6, show_default=True, help="Pairs in the batch.")
@click.option("--tokens", default=176, show_default=True, help="Tokens of each.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def profile(artifact: Path, count: int, tokens: int, json_path: Path | None) -> None:
    """Where an openvino artifact spends its time, and its linear layers against this machine's measured peak.

    One batch on one thread. ONEDNN_MAX_CPU_ISA limits the instruction set.
    """
    with load(artifact, threads=1) as runtime:
        if runtime.manifest.target != "openvino":
            raise UsageError(f"{artifact}: a profile of '{runtime.manifest.target}' is not made, only of 'openvino'")
        from ettin.bench.profile import peak_gops, profiled
        from ettin.runtimes.on_openvino import OpenVinoRuntime

        assert isinstance(runtime, OpenVinoRuntime)  # noqa: S101 (the target says so)
        texts = pairs_to_score(None, count, tokens)
        batch = Batch.of(runtime.tokenizer.pairs(texts, tokens), runtime.manifest.tokenizer.pad_token_id)
        hint, facts = runtime.arithmetic, about(runtime)
        parts = profiled(runtime, batch)
    peaks = {"int8 linear": peak_gops(hint, int8=True), "float linear": peak_gops(hint, int8=False)}
    total = sum(part.milliseconds for part in parts.values())
    figures = []
    for name, part in parts.items():
        gops = part.operations / part.milliseconds / 1e6
        share = gops / peaks[name] if gops else None
        figures.append({"part": name, **asdict(part), "gops": gops, "share_of_peak": share})
    click.echo(f"{count} × {tokens} tokens, one thread, {facts['runtime']}: {total:.1f} ms")
    settings = {"pairs": count, "tokens": tokens, "isa_limit": isa_limit(), "peak_gops": peaks}
    show_and_write(json_path, "profile", {**facts, **settings, "milliseconds": total, "parts": figures})


@command.command(
    "load", epilog=console.example_epilog("ettin-bench load ettin-reranker-demo/openvino-int8 --minutes 1")
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--server", "servers", multiple=True, help="triton, http; may be repeated.  [default: both]")
@click.option("--clients", type=click.IntRange(1), default=32, show_default=True, help="At the same time.")
@click.option("--requests", type=click.IntRange(1), default=96, show_default=True, help="Of a throughput round.")
@click.option("--candidates", type=click.IntRange(2), default=100, show_default=True, help="Documents of a request.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved, of the throughput.")
@click.option("--minutes", type=float, default=5.0, show_default=True, help="Of mixed load, for each server.")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own passages]")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def load_test(
    artifact: Path, servers: tuple[str, ...], clients: int, requests: int, candidates: int, rounds: int,
    minutes: float, data: Path | None, max_length: int, json_path: Path | None,
) -> None:  # fmt: skip
    """Many clients against Triton and ettin-serve: throughput, latencies, lost and wrong answers, memory.

    First every client asks for all candidates, in rounds beside the runtime in process; then for one document or for
    all, at random.
    """
    try:
        from ettin.bench.load import run
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench load", str(error.name), "bench,serve,triton") from None
    pairs = pairs_to_score(data, 2000)
    with console.step(f"{rounds} rounds of {requests} requests, then {minutes:g} min of mixed load"):
        found = run(
            artifact, servers or ("triton", "http"), pairs, clients=clients, requests=requests, candidates=candidates,
            rounds=rounds, minutes=minutes, max_length=max_length,
        )  # fmt: skip
    show_and_write(json_path, "load", {"data": data.name if data else "passages", **found})


@command.command("gpu-bundle", epilog=console.example_epilog("ettin-bench gpu-bundle for-the-gpu"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Trained, for parity.  [default: the embedded one]")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own passages]")
@click.option("--pairs", "count", default=2000, show_default=True, help="Pairs of text.")
@click.option("--force", is_flag=True, help="Replace a folder that is already there.")
def gpu_bundle(folder: Path, checkpoint: Path | None, data: Path | None, count: int, force: bool) -> None:
    """Write one folder that measures a GPU where only torch and transformers are installed."""
    size_bytes = assemble(folder, checkpoint or DEMO_FOLDER, pairs_to_score(data, count), force)
    console.note(f"  {size_bytes / 2**20:.0f} MiB. On the machine with the GPU: python {folder}/ettin/bench/gpu.py")
    click.echo(folder)


def _means(found: "Quality") -> dict[str, Any]:
    return {
        "ndcg10": found.ndcg10, "map": found.map, "mrr10": found.mrr10, "seconds": found.seconds,
        "ndcg10_by_query": found.by_query,
    }  # fmt: skip


def _reference(folder: Path, max_length: int) -> Any:
    """Gold's `predict`, raw logits."""
    import torch

    from ettin.export.checkpoint import read_checkpoint
    from ettin.export.gold import load_gold

    model = load_gold(read_checkpoint(folder))
    model.max_seq_length = max_length
    return lambda pairs: model.predict([list(pair) for pair in pairs], batch_size=8, activation_fn=torch.nn.Identity())


for each in (cpu, lengths, everything, compare_results, report, tables):
    command.add_command(each)


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
