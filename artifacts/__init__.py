"""The artifact format: manifest, files, parity pairs, comparison metrics and errors. Needs no engine."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ettin.artifacts.errors import EttinError
    from ettin.artifacts.files import check_files
    from ettin.artifacts.manifest import Manifest
    from ettin.artifacts.parity import ParityCase, read_parity
    from ettin.artifacts.targets import TARGETS

__all__ = ["TARGETS", "EttinError", "Manifest", "ParityCase", "check_files", "read_parity"]

# Imported on use: `bench/gpu.py` runs where pydantic, which the manifest needs, is not installed.
_HOMES = {
    "TARGETS": "targets",
    "EttinError": "errors",
    "Manifest": "manifest",
    "ParityCase": "parity",
    "check_files": "files",
    "read_parity": "parity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
