"""Artifact → scores, without torch (but for the `transformers` target).

from ettin.runtimes import load

with load("ettin-reranker-demo/openvino-int8") as reranker:
    hits = reranker.rank("Which planet is known as the Red Planet?", documents, top_k=3)
"""

from typing import TYPE_CHECKING

from ettin.artifacts.lazy import lazily

if TYPE_CHECKING:
    from ettin.artifacts.errors import EttinError
    from ettin.runtimes.base import Runtime
    from ettin.runtimes.batch import Batch
    from ettin.runtimes.loading import load

__all__ = ["Batch", "EttinError", "Runtime", "load"]

__getattr__ = lazily(
    __name__,
    {
        "Batch": "ettin.runtimes.batch",
        "EttinError": "ettin.artifacts.errors",
        "Runtime": "ettin.runtimes.base",
        "load": "ettin.runtimes.loading",
    },
)
