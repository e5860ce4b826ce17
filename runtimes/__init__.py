"""Artifact → scores, without torch (but for the `transformers` target).

from ettin.runtimes import load

with load("ettin-reranker-demo/openvino-int8") as reranker:
    hits = reranker.rank("Which planet is known as the Red Planet?", documents, top_k=3)
"""

from ettin.artifacts.errors import EttinError
from ettin.runtimes.base import Runtime
from ettin.runtimes.batch import Batch
from ettin.runtimes.loading import load
from ettin.runtimes.long_documents import LongDocuments

__all__ = ["Batch", "EttinError", "LongDocuments", "Runtime", "load"]
