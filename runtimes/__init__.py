"""Artifact → scores, without torch (but for the `transformers` target).

from ettin.runtimes import load

with load("ettin-reranker-demo/openvino-int8") as reranker:
    hits = reranker.rank("Which planet is known as the Red Planet?", documents, top_k=3)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ettin.artifacts.errors import EttinError
    from ettin.runtimes.base import Runtime
    from ettin.runtimes.batch import Batch
    from ettin.runtimes.registry import load

__all__ = ["Batch", "EttinError", "Runtime", "load"]

# Imported on use, as in `ettin.artifacts`.
_HOMES = {
    "Batch": "ettin.runtimes.batch",
    "EttinError": "ettin.artifacts.errors",
    "Runtime": "ettin.runtimes.base",
    "load": "ettin.runtimes.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
