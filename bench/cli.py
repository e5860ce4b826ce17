"""`ettin-bench`: measures artifacts on this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import click

from ettin.artifacts.errors import MissingDependency, UsageError
from ettin.bench.bundle import assemble
from ettin.bench.cli_cpu import cpu, everything, lengths
from ettin.bench.cli_quality import parity, quality
from ettin.bench.cli_results import compare_results, report, tables
from ettin.bench.cli_shared import about, show_and_write
from ettin.bench.cli_speed import make_peers, peers, throughput
from ettin.bench.texts import pairs_to_score, text_name
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import load
from ettin.runtimes.batch import Batch
from ettin.runtimes.commands import console
from ettin.runtimes.machine import isa_limit


@click.group()
def command() -> None:
    """Measure artifacts: speed, and ranking quality."""


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
        from ettin.runtimes.engines.on_openvino import OpenVinoRuntime

        assert isinstance(runtime, OpenVinoRuntime)  # noqa: S101 (the target says so)
        texts = pairs_to_score(None, count, tokens)
        batch = Batch.of(runtime.tokenizer.pairs(texts, tokens), runtime.manifest.tokenizer.pad_token_id)
        hint, facts = runtime.precision_hint, about(runtime)
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
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own text]")
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
    show_and_write(json_path, "load", {"data": text_name(data), **found})


@command.command("gpu-bundle", epilog=console.example_epilog("ettin-bench gpu-bundle for-the-gpu"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Trained, for parity.  [default: the embedded one]")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own text]")
@click.option("--pairs", "count", default=2000, show_default=True, help="Pairs of text.")
@click.option("--force", is_flag=True, help="Replace a folder that is already there.")
def gpu_bundle(folder: Path, checkpoint: Path | None, data: Path | None, count: int, force: bool) -> None:
    """Write one folder that measures a GPU where only torch and transformers are installed."""
    size_bytes = assemble(folder, checkpoint or DEMO_FOLDER, pairs_to_score(data, count), force)
    console.note(f"  {size_bytes / 2**20:.0f} MiB. On the machine with the GPU: python {folder}/ettin/bench/gpu.py")
    click.echo(folder)


for each in (throughput, quality, parity, cpu, peers, make_peers, lengths, everything, compare_results, report, tables):
    command.add_command(each)


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
