"""`ettin-gpu`: measures everything that needs a GPU in one visit."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from ettin.artifacts.errors import UsageError
from ettin.bench.machine import write_result
from ettin.bench.report import TABLES
from ettin.bench.workloads import pairs_to_score, text_name
from ettin.export.source.sizes import DEMO_FOLDER, SIZES
from ettin.gpu.visit.parts import PARTS
from ettin.gpu.visit.plan import Visit
from ettin.gpu.visit.report import MAX_LENGTH, Task
from ettin.runtimes.commands import console

_PATH = click.Path(path_type=Path)
_MINUTES = 9.0


@click.command(
    epilog=console.example_epilog(
        "ettin-gpu --json h100.json --golden fa2-ettin-reranker-demo.json",
        "ettin-gpu --bundle for-the-gpu",
        "ettin-gpu --device cpu --size tiny --minutes 60 --json rehearsal.json",
    )
)
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Part to run; repeatable.  [default: all]"
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=click.Choice([*SIZES, "tiny"]),
    default=list(SIZES),
    help="Size to measure; repeatable.  [default: all released ones]",
)
@click.option("--setting", "settings", multiple=True, help="Setting to time; repeatable.  [default: all]")
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu: a rehearsal."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=_MINUTES,
    show_default=True,
    help="Time limit in minutes of all parts together.",
)
@click.option("--checkpoint", type=_PATH, default=DEMO_FOLDER, help="Trained checkpoint for parity.  [default: demo]")
@click.option("--data", type=_PATH, help="BEIR folder, JSON lines, or nq (hub).  [default: built-in texts]")
@click.option("--artifacts", type=_PATH, help="Folder of artifacts to verify on the device.")
@click.option("--golden", type=_PATH, help="File for the scores of FlashAttention-2.")
@click.option(
    "--bundle", type=_PATH, help="Write a folder that measures on a machine with only torch and transformers."
)
@click.option("--json", "json_path", type=_PATH, help="File for the result, rewritten as results arrive.")
def command(
    parts: tuple[str, ...], minutes: float, data: Path | None, golden: Path | None, bundle: Path | None,
    json_path: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Measure parity, speed and the time of each kernel on a GPU, in less than nine minutes.

    The most important parts run first: errors of PyTorch's FlashAttention-2 and of this project's graphs against fp32;
    pairs per second of every size; time of each kernel; the attention kernel alone; artifacts; compiled settings. Each
    part has a time limit. A part that fails or takes too long says so in the result, and the next one follows.
    Experimental: not yet run on a GPU.
    """
    task = Task(data=data, **options)
    if bundle:
        from ettin.gpu.visit.bundle import write_bundle

        size_bytes = write_bundle(bundle, task.checkpoint, pairs_to_score(data, 2000), task.artifacts)
        console.note(f"  {size_bytes / 2**20:.0f} MiB. On the machine with the GPU: python {bundle} --json result.json")
        click.echo(bundle)
        return
    if task.settings:
        _check_settings(task.settings)
    command_line = shlex.join(["ettin-gpu", *sys.argv[1:]])

    def save(result: dict[str, Any], machine: dict[str, Any]) -> None:
        cases = result.get("parity", {}).pop("golden", None)
        if cases:
            write_result(golden, "fa2-golden", cases, command_line, machine)
        write_result(json_path, "gpu-visit", {**common, **result}, command_line, machine)

    common = {"data": text_name(data), "max_length": MAX_LENGTH}
    limits_s = {name: PARTS[name].limit_s * minutes / _MINUTES for name in PARTS if name in parts or not parts}
    visit = Visit(task, limits_s, save)
    try:
        visit.run()
    finally:
        head, *rows = TABLES["gpu"]([visit.result])
        console.table(rows, head)


def _check_settings(names: Sequence[str]) -> None:
    from ettin.gpu.visit.settings import SETTINGS

    timed = [name for name, setting in SETTINGS.items() if setting.part]
    for name in names:
        if name not in timed:
            raise UsageError(f"unknown setting '{name}', expected one of: {', '.join(timed)}")


def main() -> NoReturn:
    """Entry point."""
    console.run(command, publishes=True)
