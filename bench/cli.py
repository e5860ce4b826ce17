"""`ettin-bench`: measures artifacts on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from ettin.artifacts.errors import InputError, MissingDependency, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.writing import write_file
from ettin.bench.machine import about, artifact_name, size_mib, write_result
from ettin.bench.peers import PEERS
from ettin.bench.report import TABLES, filled
from ettin.bench.speed import SpeedRun
from ettin.bench.workloads import pairs_to_score, text_name
from ettin.runtimes import Batch, load
from ettin.runtimes.commands import console
from ettin.runtimes.machine import isa_limit

_PATH = click.Path(path_type=Path)
_SETTINGS = click.Choice(["threads", "streams", "cache_dir"])
_ARTIFACTS = click.argument("artifacts", nargs=-1, required=True, type=_PATH)
_DATA = click.option("--data", type=_PATH, help="BEIR folder, JSON lines, or nq (hub).  [default: texts of ours]")
_JSON = click.option("--json", "json_path", type=_PATH, help="Write the result there, too.")
_MAX_LENGTH = click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
_CANDIDATES = click.option("--candidates", type=int, default=100, show_default=True, help="Documents of a query.")


@click.group()
def command() -> None:
    """Measure artifacts: speed, ranking quality, servers under load."""


def _show_and_write(path: Path | None, kind: str, result: dict[str, Any]) -> None:
    """Shows a result as the table that a README would have, and writes it."""
    head, *rows = TABLES[kind]([result])
    console.table(rows, head)
    write_result(path, kind, result)


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Says which extra to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        command_name = f"ettin-bench {click.get_current_context().info_name}"
        raise MissingDependency(command_name, str(error.name), extra) from None


@command.command(
    epilog=console.example_epilog(
        "ettin-bench speed ettin-reranker-demo/openvino-int8",
        "ettin-bench speed ettin-reranker-demo/* --checkpoint demo --peer st-fp32 --peer st-fp32-tuned",
    )
)
@_ARTIFACTS
@click.option("--checkpoint", help="Checkpoint for the peers: a folder, demo, or a size (with random weights).")
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Compare with it. Repeatable.")
@click.option("--environments", type=_PATH, help="Folder of the peers' own environments, made where they are missing.")
@click.option("--before", type=_PATH, help="Interpreter of an earlier version's environment: run artifacts there, too.")
@_DATA
@click.option("--pairs", "count", type=click.IntRange(1), help="Pairs of a pass.  [default: by size of the model]")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed passes of each contestant.")
@click.option("--requests", type=click.IntRange(1), default=21, show_default=True, help="Requests to each contestant.")
@_MAX_LENGTH
@click.option("--length", "lengths", multiple=True, type=int, help="Compare at pairs of this many tokens. Repeatable.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--load", multiple=True, type=(_SETTINGS, str), help="Setting: threads 4, streams 1. Repeatable.")
@click.option("--best-batch", is_flag=True, help="First search the best batch size of each contestant.")
@_JSON
def speed(json_path: Path | None, **options: Any) -> None:
    """Pairs per second, latency, load time, memory and error of ARTIFACTS, alone or beside peers.

    All score the same pairs at their natural lengths, round by round, a process each. "×" is the speed divided by that
    of st-fp32 (else of the first contestant, or of the earlier version) in the same round: median and range. "of peak"
    is the model's work in that time against this machine's fastest matrix product of that precision.
    ONEDNN_MAX_CPU_ISA (with ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS for torch) limits the instruction set of
    everybody but ONNX Runtime.
    """
    _show_and_write(json_path, "speed", SpeedRun(**options).measured())


@command.command(epilog=console.example_epilog("ettin-bench quality my-model/* --data scifact --reference my-model"))
@_ARTIFACTS
@click.option("--data", "sets", multiple=True, type=_PATH, help="BEIR folder, repeatable; or nanobeir (from the hub).")
@click.option("--split", default="test", show_default=True, help="test or train.")
@_CANDIDATES
@click.option("--queries", type=click.IntRange(1), help="Queries of a set, at most.  [default: all]")
@_MAX_LENGTH
@click.option("--reference", type=_PATH, help="The checkpoint's folder: compare with PyTorch in fp32.")
@_JSON
def quality(json_path: Path | None, **options: Any) -> None:
    """Ranking quality of ARTIFACTS on sets with judged queries; without --data, what was proven at their export.

    nDCG@10, MAP and MRR@10; the change of nDCG@10 against the reference comes with its 95% interval, a paired bootstrap
    over queries. Of several sets, the mean; beside NanoBEIR's stands the published one.
    """
    if not options["sets"]:
        _show_and_write(json_path, "parity", _parity(options["artifacts"]))
        return
    with _needs("bench"):
        from ettin.bench.quality import measured_quality
    _show_and_write(json_path, "quality", measured_quality(**options))


def _parity(artifacts: tuple[Path, ...]) -> dict[str, Any]:
    """What the manifests of artifacts say of their proof."""
    rows = []
    for path in artifacts:
        manifest = Manifest.read(path)
        proven = manifest.parity.model_dump(mode="json", exclude={"reference", "rule"})
        source = {"weights": manifest.source.weights, "weights_sha256": manifest.source.weights_sha256}
        rows.append({"artifact": artifact_name(path), **source, **proven, "size_mib": size_mib(path)})
    return {"data": ", ".join(sorted({Manifest.read(path).name for path in artifacts})), "rows": rows}


@command.command("load", epilog=console.example_epilog("ettin-bench load ettin-reranker-demo/openvino-int8"))
@click.argument("artifact", type=_PATH)
@click.option("--server", "servers", multiple=True, type=click.Choice(["triton", "http"]), default=["triton", "http"])
@click.option("--clients", type=click.IntRange(1), default=32, show_default=True, help="Number of clients.")
@click.option("--requests", type=click.IntRange(1), default=96, show_default=True, help="Requests in each round.")
@_CANDIDATES
@click.option("--minutes", type=float, default=5.0, show_default=True, help="Minutes of mixed load on each server.")
@_DATA
@_JSON
def load_test(artifact: Path, data: Path | None, json_path: Path | None, **options: Any) -> None:
    """Many clients against Triton and ettin-serve: throughput, latencies, lost and wrong answers, memory.

    First every client asks for all candidates, in rounds beside the runtime in process; then for one document or for
    all, at random.
    """
    with _needs("bench,serve,triton"):
        from ettin.bench.load import measured_load
    result = measured_load(artifact, pairs_to_score(data, 2000), **options)
    _show_and_write(json_path, "load", {"data": text_name(data), **result})


@command.command(epilog=console.example_epilog("ettin-bench profile ettin-reranker-17m-v1/openvino-int8"))
@click.argument("artifact", type=_PATH)
@click.option("--pairs", "count", default=6, show_default=True, help="Pairs in the batch.")
@click.option("--tokens", default=176, show_default=True, help="Tokens of each pair.")
@_JSON
def profile(artifact: Path, count: int, tokens: int, json_path: Path | None) -> None:
    """Where an openvino artifact spends its time, and its linear layers against this machine's measured peak.

    One batch on one thread. ONEDNN_MAX_CPU_ISA limits the instruction set.
    """
    with load(artifact, threads=1) as runtime:
        if runtime.manifest.target != "openvino":
            raise UsageError(f"{artifact}: target is '{runtime.manifest.target}', only 'openvino' can be profiled")
        from ettin.bench.peaks import profile_figures

        texts = pairs_to_score(None, count, tokens)
        batch = Batch.of(runtime.tokenizer.pairs(texts, tokens), runtime.manifest.tokenizer.pad_token_id)
        facts, figures = about(runtime), profile_figures(runtime, batch)
    click.echo(f"{count} × {tokens} tokens, one thread, {facts['runtime']}: {figures['milliseconds']:.1f} ms")
    settings = {"pairs": count, "tokens": tokens, "isa_limit": isa_limit()}
    _show_and_write(json_path, "profile", {**facts, **settings, **figures})


@command.command(epilog=console.example_epilog("ettin-bench report README.md"))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is stale.")
def report(files: tuple[Path, ...], check: bool) -> None:
    """Rewrite the marked tables and the plots of Markdown FILES from the results that they name."""
    for file in files:
        before = file.read_text(encoding="utf-8")
        after = filled(before, file.parent)
        if check and after != before:
            raise InputError(f"{file}: a table differs from its results. Run: ettin-bench report {file}")
        if check:
            continue
        with _needs("bench"):
            from ettin.bench.plots import draw_shown
        if after != before:
            write_file(file, after.encode())
        draw_shown(file)


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
