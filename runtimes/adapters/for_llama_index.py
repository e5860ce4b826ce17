"""LlamaIndex: a postprocessor that reranks nodes."""

from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from ettin.artifacts.errors import UsageError
from ettin.runtimes.base import Runtime


class EttinRerank(BaseNodePostprocessor):  # type: ignore[misc]
    """Keeps the nodes that are most relevant to the query, best first; their scores become those of `rank`.

    A node's text is what LlamaIndex embeds: its content, and the metadata that is not excluded from embedding.

    Args:
        runtime: what `load` returned; it stays the caller's to close.
        top_n: maximum number of nodes.
    """

    top_n: int = Field(description="Maximum number of nodes.", ge=0)
    _runtime: Any = PrivateAttr()

    def __init__(self, runtime: Runtime, top_n: int = 2) -> None:
        super().__init__(top_n=top_n)
        self._runtime = runtime

    @classmethod
    def class_name(cls) -> str:
        return "EttinRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise UsageError("no query to rank nodes for. Pass query_str or query_bundle")
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        hits = self._runtime.rank(query_bundle.query_str, texts, top_k=self.top_n)
        return [NodeWithScore(node=nodes[hit["corpus_id"]].node, score=hit["score"]) for hit in hits]
