"""`ettin-bench throughput` and `peers`: speed by the release's method, and beside what a user would pick instead."""

from pathlib import Path

import click

from ettin.artifacts.errors import EttinError
from ettin.bench.cli_shared import show_and_write
from ettin.bench.contest import Contest, artifact_entries, measured, token_lengths, weights_of
from ettin.bench.peers import PEERS, installed_in, make_environments, peer_entries
from ettin.bench.texts import pairs_to_score, text_name
from ettin.bench.throughput import SETTINGS, ThroughputRun
from ettin.runtimes.commands import console

DATA = click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Retrieval set in BEIR form, or nq: Natural Questions, from the hub.  [default: own text of such lengths]",
)


@click.command(
    epilog=console.example_epilog(
        "ettin-bench throughput ettin-reranker-demo/openvino-int8",
        "ettin-bench throughput my-model/openvino-int8 my-model/onnx-fp32 --checkpoint my-model --setting st-fp32",
    )
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the artifacts were made from, for PyTorch.")
@click.option("--setting", "settings", multiple=True, help=f"Of PyTorch: {', '.join(SETTINGS)}; may be repeated.")
@DATA
@click.option("--pairs", "count", type=click.IntRange(1), default=400, show_default=True, help="Pairs in a pass.")
@click.option("--passes", type=click.IntRange(1), default=3, show_default=True, help="Timed; the median is reported.")
@click.option("--requests", type=click.IntRange(1), default=21, show_default=True, help="Whose latency is measured.")
@click.option("--candidates", type=click.IntRange(1), default=100, show_default=True, help="Documents of a request.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads, for artifacts.  [default: one a core]")
@click.option("--streams", type=click.IntRange(1), help="Batches at a time, for artifacts.  [default: one a thread]")
@click.option("--probe/--no-probe", default=True, help="Look for everybody's best batch first.  [default: probe]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def throughput(
    artifacts: tuple[Path, ...], checkpoint: Path | None, settings: tuple[str, ...], data: Path | None, count: int,
    passes: int, requests: int, candidates: int, max_length: int, device: str, threads: int | None,
    streams: int | None, probe: bool, json_path: Path | None,
) -> None:  # fmt: skip
    """Pairs per second by the release's method: natural lengths, the best batch size, median of several passes.

    Batches are doubled from small until that brings nothing or memory ends: by tokens for artifacts, by pairs for
    PyTorch. Then all take turns, a process each. "of peak": the model's work, done in that time, against this machine's
    fastest matrix product of that precision.
    """
    given = {"threads": threads, "streams": streams}
    run = ThroughputRun(
        artifacts, checkpoint, settings, data=data, count=count, passes=passes, requests=requests,
        candidates=candidates, max_length=max_length, device=device, probe=probe,
        load={name: value for name, value in given.items() if value},
    )  # fmt: skip
    show_and_write(json_path, "throughput", run.measured())


_WHO = f"{', '.join(PEERS)}; may be repeated.  [default: all]"


@click.command("make-peers", epilog=console.example_epilog("ettin-bench make-peers peers"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--peer", "names", multiple=True, type=click.Choice(list(PEERS)), metavar="NAME", help=_WHO)
def make_peers(folder: Path, names: tuple[str, ...]) -> None:
    """Make an environment in FOLDER for each program that `peers` measures; those that are there are kept.

    Some gigabytes, and ten minutes where llama.cpp is compiled.
    """
    problems = make_environments(folder, names or tuple(PEERS))
    if problems:
        raise EttinError("; ".join(f"{name}: {reason}" for name, reason in problems.items()))


@click.command(
    epilog=console.example_epilog(
        "ettin-bench make-peers environments",
        "ettin-bench peers my-model/openvino-int8 my-model/onnx-fp32 my-model/transformers-fp32 "
        "--checkpoint my-model --environments environments",
    )
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--environments", type=click.Path(path_type=Path), required=True, help="Made by make-peers.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the artifacts were made from, for the peers.")
@click.option("--peer", "names", multiple=True, type=click.Choice(list(PEERS)), metavar="NAME", help=_WHO)
@DATA
@click.option("--pairs", "count", type=click.IntRange(1), default=400, show_default=True, help="Pairs in a pass.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Passes of each, in turns.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there, too.")
def peers(
    artifacts: tuple[Path, ...], environments: Path, checkpoint: Path | None, names: tuple[str, ...],
    data: Path | None, count: int, rounds: int, max_length: int, json_path: Path | None,
) -> None:  # fmt: skip
    """Artifacts against what a user would pick instead: same pairs, in turns, each in an environment of its own.

    Peers run the checkpoint, the onnx artifacts or (llama.cpp) the transformers ones among ARTIFACTS. One that can't
    says why.
    """
    chosen = names or tuple(PEERS)
    pairs = pairs_to_score(data, count)
    contest = Contest(pairs, min(100, len(pairs)), max_length, rounds)
    lengths = token_lengths(contest, artifacts[0])
    with peer_entries(chosen, environments, checkpoint, artifacts) as others:
        entries = artifact_entries(artifacts, {}) + others
        results = measured(contest, entries, artifacts, lengths)
    settings = {"data": text_name(data), "weights": weights_of(artifacts), "pairs": len(pairs), "rounds": rounds}
    figures = {"tokens_per_pair": sum(lengths) / len(pairs), "candidates": contest.candidates, "max_length": max_length}
    installed = installed_in(environments, chosen)
    show_and_write(json_path, "peers", {**settings, **figures, "contestants": results, "environments": installed})
