"""`ettin-bench`: measures artifacts on this machine."""

import functools
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ettin.artifacts.errors import EttinError, InputError, MissingDependency, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.metrics import score_error
from ettin.bench.beir import read_beir
from ettin.bench.bundle import assemble
from ettin.bench.cpu import ISAS, NOTES, PEERS, compare, contestants, result
from ettin.bench.machine import write_result
from ettin.bench.tables import TABLES, filled
from ettin.bench.texts import pairs_to_score
from ettin.bench.throughput import pairs_per_s
from ettin.export.sizes import DEMO_FOLDER
from ettin.runtimes import Runtime, console, load
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
        _write(
            json_path, "throughput", {**_artifact(runtime), "data": str(data.name if data else "passages"), **result}
        )


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
            results.append({**_artifact(runtime), **_means(found)})
        if gold:
            delta = score_error(found.scores, gold.scores)
            moved, low, high = change(found, gold)
            tau = kendall(found.scores, gold.scores)
            results[-1] |= {"ndcg10_change": moved, "ndcg10_change_95": [low, high], **delta.figures(), "kendall": tau}
    settings = {"data": rows.name, "queries": len(candidates), "candidates": count, "max_length": max_length}
    _report(json_path, "quality", {**settings, "first_stage_ndcg10": first_stage, "rows": results})


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
        hint, about = runtime.arithmetic, _artifact(runtime)
        parts = profiled(runtime, batch)
    peaks = {"int8 linear": peak_gops(hint, int8=True), "float linear": peak_gops(hint, int8=False)}
    total = sum(part.milliseconds for part in parts.values())
    figures = []
    for name, part in parts.items():
        gops = part.operations / part.milliseconds / 1e6
        share = gops / peaks[name] if gops else None
        figures.append({"part": name, **asdict(part), "gops": gops, "share_of_peak": share})
    click.echo(f"{count} × {tokens} tokens, one thread, {about['runtime']}: {total:.1f} ms")
    settings = {"pairs": count, "tokens": tokens, "isa_limit": isa_limit(), "peak_gops": peaks}
    _report(json_path, "profile", {**about, **settings, "milliseconds": total, "parts": figures})


@command.command(
    epilog=console.example_epilog(
        "ettin-bench cpu my-model/openvino-int8 --checkpoint my-model --peer st-fp32 --peer st-bf16 --data squad"
    )
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the artifacts were made from, for the peers.")
@click.option("--peer", "peers", multiple=True, help=f"{', '.join(PEERS)}; may be repeated.")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own passages]")
@click.option("--pairs", "count", default=400, show_default=True, help="Pairs in a pass.")
@click.option("--rounds", default=5, show_default=True, help="Interleaved passes of each contestant.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--fill", is_flag=True, help="Join documents until each pair has --max-length tokens.")
@click.option("--streams", type=click.IntRange(1), help="Batches at a time, for artifacts.  [default: one a thread]")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Load artifacts with a filled model cache.")
@click.option("--isa", type=click.Choice(list(ISAS)), default="all", show_default=True, help="Limit for everybody.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def cpu(
    artifacts: tuple[Path, ...], checkpoint: Path | None, peers: tuple[str, ...], data: Path | None, count: int,
    rounds: int, max_length: int, fill: bool, streams: int | None, cache_dir: Path | None, isa: str,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Artifacts against what a user would run instead: same pairs, interleaved rounds, a process each."""
    random_weights = any(Manifest.read(path).source.weights == "random" for path in artifacts)
    chosen = {"streams": streams, "cache_dir": str(cache_dir) if cache_dir else None}
    entries = contestants(artifacts, {key: value for key, value in chosen.items() if value}, checkpoint, peers)
    pairs = pairs_to_score(data, count, max_length if fill else None)
    candidates = min(100, len(pairs))
    with console.step(f"{rounds} rounds of {len(pairs)} pairs"):
        compare(
            entries, pairs, candidates=candidates, max_length=max_length, rounds=rounds, isa=isa, warm=bool(cache_dir)
        )
    reference = next((entry for entry in entries if entry.name.startswith("st-fp32")), None)
    results = [result(entry, len(pairs), reference) for entry in entries]
    for each in results:
        click.echo(f"{each['name']}: {each.get('description') or each['problem']}")
    settings = {
        "data": data.name if data else "passages",
        "pairs": len(pairs),
        "candidates": candidates,
        "rounds": rounds,
        "max_length": max_length,
        "filled": fill,
        "model_cache": bool(cache_dir),
        "weights": "random" if random_weights else "checkpoint",
    }
    _report(json_path, "cpu", {**settings, "isa": isa, "isa_note": NOTES[isa], "contestants": results})


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
    _report(json_path, "load", {"data": data.name if data else "passages", **found})


@command.command(
    epilog=console.example_epilog("ettin-bench lengths my-model/openvino-int8 --checkpoint my-model --peer st-fp32")
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the artifacts were made from, for the peers.")
@click.option("--peer", "peers", multiple=True, help=f"{', '.join(PEERS)}; may be repeated.")
@click.option("--lengths", "steps", default="64,128,256,512,1024,2048,4096,7999", show_default=True, help="In tokens.")
@click.option("--tokens", default=16384, show_default=True, help="Tokens in a pass, roughly.")
@click.option("--rounds", default=3, show_default=True, help="Interleaved passes of each contestant.")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own passages]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def lengths(
    artifacts: tuple[Path, ...], checkpoint: Path | None, peers: tuple[str, ...], steps: str, tokens: int,
    rounds: int, data: Path | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Speed by length: every pair filled to the same number of tokens, from short to the longest."""
    found = []
    for length in _numbers(steps):
        entries = contestants(artifacts, {}, checkpoint, peers)
        pairs = pairs_to_score(data, max(2, tokens // length), length)
        with console.step(f"{rounds} rounds of {len(pairs)} pairs of {length} tokens"):
            compare(entries, pairs, candidates=1, max_length=length, rounds=rounds, isa="all")
        results = [result(entry, len(pairs), None) for entry in entries]
        found.append({"max_length": length, "pairs": len(pairs), "contestants": results})
    weights = {Manifest.read(path).source.weights for path in artifacts}
    settings = {"name": artifacts[0].parent.name, "data": data.name if data else "passages", "rounds": rounds}
    _report(json_path, "lengths", {**settings, "weights": "/".join(sorted(weights)), "lengths": found})


@command.command(epilog=console.example_epilog("ettin-bench report bench/results --output report.html"))
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), help="Also write the plots as SVG files into this folder.")
def report(results: tuple[Path, ...], output: Path, pictures: Path | None) -> None:
    """One self-contained HTML page of RESULTS: files, or folders of them."""
    try:
        from ettin.bench.report import page, read_results, write_pictures
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench report", str(error.name), "bench") from None
    records = read_results(results)
    output.write_text(page(records), encoding="utf-8")
    if pictures:
        write_pictures(records, pictures)
    click.echo(output)


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"--lengths is '{text}', expected numbers with commas between them") from None


@command.command("compare", epilog=console.example_epilog("ettin-bench compare before.json after.json"))
@click.argument("old", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("new", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--baseline", help="Contestant that the others are divided by.  [default: sentence-transformers fp32]")
@click.option("--check", is_flag=True, help="Fail if something is slower or worse.")
def compare_results(old: Path, new: Path, baseline: str | None, check: bool) -> None:
    """What changed between two results of cpu, load, throughput or quality, as far as it can be told from noise."""
    try:
        from ettin.bench.compare import compare as verdicts_on
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench compare", str(error.name), "bench") from None
    verdicts, basis = verdicts_on(old, new, baseline)
    form = "{:+.4f}" if basis.startswith("nDCG") else "{:+.1%}"
    rows = [
        [each.name, form.format(each.change), f"{form.format(each.low)} … {form.format(each.high)}", each.word]
        for each in verdicts
    ]
    console.table(rows, ["what", "change", "95 %", "verdict"])
    console.note(basis)
    lost = [each.name for each in verdicts if each.word in ("slower", "worse")]
    if check and lost:
        raise EttinError(f"{', '.join(lost)}: {new} is slower or worse than {old}")


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


@command.command(epilog=console.example_epilog("ettin-bench tables README.md"))
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is stale.")
def tables(file: Path, check: bool) -> None:
    """Make the marked tables of a Markdown file again from the results that they name."""
    before = file.read_text(encoding="utf-8")
    after = filled(before, file.parent)
    if check and after != before:
        raise InputError(f"{file}: a table is not what its results say. Run: ettin-bench tables {file}")
    if after != before:
        file.write_text(after, encoding="utf-8")


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


def _artifact(runtime: Runtime) -> dict[str, Any]:
    made = runtime.manifest
    return {
        "artifact": f"{made.name}/{made.target}-{made.precision}",
        "weights": made.source.weights,
        "weights_sha256": made.source.weights_sha256,
        "runtime": runtime.description,
    }


def _report(path: Path | None, kind: str, result: dict[str, Any]) -> None:
    """Shows a result as the table that a README would have, and writes it."""
    head, *rows = TABLES[kind]([result])
    console.table(rows, head)
    _write(path, kind, result)


def _write(path: Path | None, kind: str, result: dict[str, Any]) -> None:
    write_result(path, kind, shlex.join(["ettin-bench", *sys.argv[1:]]), result)


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
