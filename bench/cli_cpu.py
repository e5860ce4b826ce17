"""`ettin-bench cpu`, `lengths`, `all`: artifacts against what a user would run instead, on CPUs."""

from datetime import UTC, datetime
from pathlib import Path

import click

from ettin.artifacts.errors import UsageError
from ettin.bench.cli_shared import show_and_write
from ettin.bench.contest import PEERS, Contest, contestants, result, weights_of
from ettin.bench.cpu import ISAS, CpuRun
from ettin.bench.texts import pairs_to_score, text_name
from ettin.runtimes.commands import console


@click.command(
    epilog=console.example_epilog(
        "ettin-bench cpu my-model/openvino-int8 --checkpoint my-model --peer st-fp32 --peer st-bf16 --data squad"
    )
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the artifacts were made from, for the peers.")
@click.option("--peer", "peers", multiple=True, help=f"{', '.join(PEERS)}; may be repeated.")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own text]")
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
    run = CpuRun(
        artifacts, checkpoint, peers, data=data, count=count, rounds=rounds, max_length=max_length, fill=fill,
        streams=streams, cache_dir=cache_dir, isa=isa,
    )  # fmt: skip
    show_and_write(json_path, "cpu", run.measured())


@click.command(
    epilog=console.example_epilog("ettin-bench lengths my-model/openvino-int8 --checkpoint my-model --peer st-fp32")
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the artifacts were made from, for the peers.")
@click.option("--peer", "peers", multiple=True, help=f"{', '.join(PEERS)}; may be repeated.")
@click.option("--lengths", "steps", default="64,128,256,512,1024,2048,4096,7999", show_default=True, help="In tokens.")
@click.option("--tokens", default=16384, show_default=True, help="Tokens in a pass, roughly.")
@click.option("--rounds", default=3, show_default=True, help="Interleaved passes of each contestant.")
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own text]")
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
            Contest(pairs, 1, length, rounds).run(entries)
        results = [result(entry, len(pairs), None) for entry in entries]
        found.append({"max_length": length, "pairs": len(pairs), "contestants": results})
    settings = {"name": artifacts[0].parent.name, "data": text_name(data), "rounds": rounds}
    show_and_write(json_path, "lengths", {**settings, "weights": weights_of(artifacts), "lengths": found})


@click.command(
    "all", epilog=console.example_epilog("ettin-bench all demo 17m 68m --output results && ettin-bench report results")
)
@click.argument("checkpoints", nargs=-1, metavar="[CHECKPOINT]...")
@click.option("--output", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path),
    default=Path("bench-artifacts"),
    show_default=True,
    help="Where artifacts are made, and kept for the next time.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Retrieval set in BEIR form.  [default: own text]")
@click.option("--rounds", default=3, show_default=True, help="Interleaved passes of each contestant.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that pairs are truncated to.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder, for random weights.")
def everything(
    checkpoints: tuple[str, ...], output: Path, artifacts: Path, data: Path | None, rounds: int, max_length: int,
    tokenizer: Path | None,
) -> None:  # fmt: skip
    """Every backend that works here, and PyTorch: export, prove, compare. A result for each CHECKPOINT.

    A CHECKPOINT is a folder, "demo", or a released size: that shape with random weights, for its speed.  [default: demo
    17m 68m]
    """
    from ettin.bench.everything import checkpoint_of, export_all, pairs_for, result_name

    date = datetime.now(UTC).date().isoformat()
    for named in checkpoints or ("demo", "17m", "68m"):
        checkpoint = checkpoint_of(named, artifacts, tokenizer)
        console.note(checkpoint.id, bold=True)
        found, missing = export_all(checkpoint, artifacts, max_length, console.Console())
        for name, reason in missing.items():
            console.note(f"  {name}: not here: {reason}")
        chosen = CpuRun(found, checkpoint.folder, ("st-fp32", "st-fp32-tuned", "st-bf16"), data=data, rounds=rounds,
                        count=pairs_for(checkpoint.shape.num_parameters), max_length=max_length)  # fmt: skip
        file = output / result_name("cpu", checkpoint, data, date)
        show_and_write(file, "cpu", {**chosen.measured(), "missing": missing})
        click.echo(file)


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"--lengths is '{text}', expected numbers with commas between them") from None
