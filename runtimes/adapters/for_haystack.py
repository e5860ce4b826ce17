"""Haystack: a ranker, the component that `TransformersSimilarityRanker` was."""

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_to_dict

from ettin.runtimes.base import Runtime
from ettin.runtimes.loading import load


@component
class EttinRanker:
    """Ranks documents for a query, best first; their scores become those of `rank`.

    Haystack saves pipelines as text, so this component has the path of an artifact, and loads it at the first use.

    Args:
        artifact: folder of the artifact.
        top_k: maximum number of documents.
        settings: other arguments of `load`, which text can hold: `{"max_length": 512}`.
    """

    def __init__(self, artifact: str, top_k: int = 10, settings: dict[str, Any] | None = None) -> None:
        self.artifact, self.top_k, self.settings = str(artifact), top_k, settings
        self._runtime: Runtime | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the component is made of again."""
        fields: dict[str, Any] = default_to_dict(self, artifact=self.artifact, top_k=self.top_k, settings=self.settings)
        return fields

    def warm_up(self) -> None:
        """Loads the artifact; raises what `load` raises."""
        if self._runtime is None:
            self._runtime = load(self.artifact, **(self.settings or {}))

    def close(self) -> None:
        """Releases the engine; the next use loads it again."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None

    @component.output_types(documents=list[Document])  # type: ignore[untyped-decorator]
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """The best documents; one without text is scored as an empty one."""
        self.warm_up()
        assert self._runtime is not None  # noqa: S101 (loaded above)
        texts = [document.content or "" for document in documents]
        hits = self._runtime.rank(query, texts, top_k=self.top_k if top_k is None else top_k)
        return {"documents": [replace(documents[hit["corpus_id"]], score=hit["score"]) for hit in hits]}
