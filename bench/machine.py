"""Results: where they were measured, and their files."""

import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ettin.artifacts.errors import InputError
from ettin.artifacts.writing import write_file
from ettin.runtimes import machine as cpu
from ettin.runtimes.machine import installed_versions

_SCHEMA = 1
_PACKAGES = (
    "ettin-export",
    "numpy",
    "onnxruntime",
    "openvino",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)


def machine() -> dict[str, object]:
    """Processor, its instruction sets, and versions."""
    return {
        "cpu": cpu.model_name(),
        "cpus_usable": cpu.available_cpus(),
        "isa": [flag for flag in cpu.INTERESTING if flag in cpu.flags()],
        "isa_limit": cpu.isa_limit(),
        "python": platform.python_version(),
        "system": sys.platform,
        "versions": installed_versions(_PACKAGES),
    }


def write_result(
    path: Path | None, kind: str, command: str, result: Mapping[str, Any], more: Mapping[str, object] | None = None
) -> None:
    """Writes a result with the command that made it.

    Args:
        path: the file; its folder is made. None: nothing is written.
        kind: what was measured.
        command: as it was typed.
        result: the figures.
        more: what else there is to say of the machine.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {**machine(), **(more or {})}
    content = {"schema": _SCHEMA, "kind": kind, "command": command, "machine": about, "result": result}
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_result(path: Path) -> dict[str, Any]:
    """A result that `write_result` wrote: schema, kind, command, machine and result.

    Raises:
        InputError: it is none, or of another schema.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != _SCHEMA:
            raise ValueError(f"schema {found['schema']}, expected {_SCHEMA}")
        _ = found["kind"], found["command"], found["machine"]["cpu"], found["result"]
    except KeyError as error:
        raise InputError(f"{path}: not a result of ettin-bench (it lacks {error})") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a result of ettin-bench ({error})") from None
    return found
