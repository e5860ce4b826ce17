"""One folder that `gpu.py` runs from on a bare machine: code, a checkpoint, a sample of text."""

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ettin.artifacts.errors import OutputError
from ettin.artifacts.publishing import check_output, staged

_PACKAGES = ("artifacts", "bench", "export", "runtimes")
_LIMIT_MIB = 50


def assemble(output: Path, checkpoint: Path, pairs: Sequence[tuple[str, str]], force: bool = False) -> int:
    """Writes the folder.

    Args:
        output: the folder.
        checkpoint: a trained checkpoint for parity; its tokenizer serves for speed, too.
        pairs: query and document, the text.
        force: replace a folder that is there.

    Returns:
        Its size, in bytes.

    Raises:
        OutputError: the folder is there, can't be written or would be over 50 MiB.
    """
    check_output(output, force)
    with staged(output, force) as stage:
        for name in _PACKAGES:
            source = Path(str(importlib.import_module(f"ettin.{name}").__file__)).parent
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "results")
            shutil.copytree(source, stage / "ettin" / name, ignore=ignored)
        bench = stage / "ettin" / "bench"
        shutil.copytree(checkpoint, bench / "checkpoint")
        with (bench / "pairs.jsonl").open("w", encoding="utf-8") as file:
            for query, document in pairs:
                file.write(json.dumps({"query": query, "document": document}) + "\n")
        size_bytes = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
        if size_bytes > _LIMIT_MIB << 20:
            size_mib = size_bytes >> 20
            raise OutputError(f"{output}: {size_mib} MiB, expected at most {_LIMIT_MIB}: name a smaller checkpoint")
    return size_bytes
