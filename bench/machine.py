"""Where something was measured, and the file of a result."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ettin.artifacts.errors import InputError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.writing import write_file
from ettin.runtimes import Runtime
from ettin.runtimes import machine as cpu
from ettin.runtimes.machine import installed_versions

_SCHEMA = 1
_PACKAGES = (
    "ettin-export", "numpy", "onnxruntime", "openvino", "sentence-transformers", "tokenizers", "torch", "transformers",
)  # fmt: skip


def machine() -> dict[str, object]:
    """Processor, its instruction sets, and versions."""
    return {
        "cpu": cpu.model_name(),
        "cpus_usable": cpu.available_cpus(),
        "isa": [flag for flag in cpu.INTERESTING if flag in cpu.flags()],
        "isa_limit": cpu.isa_limit(),
        "pretended": pretended if (pretended := os.environ.get("PRETEND_CPU")) != "host" else None,  # bench/pretend_cpu
        "python": platform.python_version(),
        "system": sys.platform,
        "versions": installed_versions(_PACKAGES),
        **_gpu(),
    }


def _gpu() -> dict[str, object]:
    """The GPU, if this process used it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    card = torch.cuda.get_device_properties(0)
    arch = f"sm_{card.major}{card.minor}"
    return {"gpu": card.name, "arch": arch, "gpu_mib": card.total_memory >> 20, "cuda": torch.version.cuda}


def artifact_name(path: Path) -> str:
    """What a result calls an artifact: its folder's name and that of the folder above."""
    return f"{path.resolve().parent.name}/{path.name}"


def size_mib(artifact: Path) -> float:
    """Size of an artifact's files."""
    return round(sum(file.size_bytes for file in Manifest.read(artifact).files) / 2**20, 1)


def about(runtime: Runtime) -> dict[str, Any]:
    """What a result says of an artifact."""
    manifest = runtime.manifest
    return {
        "artifact": f"{manifest.name}/{manifest.target}-{manifest.precision}",
        "weights": manifest.source.weights,
        "weights_sha256": manifest.source.weights_sha256,
        "runtime": runtime.description,
    }


def write_result(
    path: Path | None, kind: str, result: Mapping[str, Any], command: str | None = None,
    where: Mapping[str, object] | None = None,
) -> None:  # fmt: skip
    """Writes a result with the command that made it, `ettin-bench` as it was typed by default; path None: nothing.

    `where` is what `machine` said where it was measured, by default here and now.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    command = command or shlex.join(["ettin-bench", *sys.argv[1:]])
    content = {"schema": _SCHEMA, "kind": kind, "command": command, "machine": where or machine(), "result": result}
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_result(path: Path) -> dict[str, Any]:
    """A result that `write_result` wrote: schema, kind, command, machine and result; an InputError if it is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']}, expected {_SCHEMA}")
        _ = content["kind"], content["command"], content["machine"]["cpu"], content["result"]
    except KeyError as error:
        raise InputError(f"{path}: not a result of ettin-bench (it lacks {error})") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a result of ettin-bench ({error})") from None
    return content
