"""What the commands of `ettin-bench` share."""

import shlex
import sys
from pathlib import Path
from typing import Any

from ettin.bench.machine import write_result
from ettin.bench.tables import TABLES
from ettin.runtimes import Runtime
from ettin.runtimes.commands import console


def about(runtime: Runtime) -> dict[str, Any]:
    """What a result says of an artifact."""
    made = runtime.manifest
    return {
        "artifact": f"{made.name}/{made.target}-{made.precision}",
        "weights": made.source.weights,
        "weights_sha256": made.source.weights_sha256,
        "runtime": runtime.description,
    }


def show_and_write(path: Path | None, kind: str, result: dict[str, Any]) -> None:
    """Shows a result as the table that a README would have, and writes it."""
    head, *rows = TABLES[kind]([result])
    console.table(rows, head)
    write(path, kind, result)


def write(path: Path | None, kind: str, result: dict[str, Any]) -> None:
    """Writes a result with what was typed."""
    write_result(path, kind, shlex.join(["ettin-bench", *sys.argv[1:]]), result)
