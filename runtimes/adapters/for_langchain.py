"""LangChain: a cross-encoder for its `CrossEncoderReranker`."""

from collections.abc import Sequence

from langchain_core.cross_encoders import BaseCrossEncoder

from ettin.runtimes.base import Runtime


class EttinCrossEncoder(BaseCrossEncoder):  # type: ignore[misc]
    """A runtime as LangChain's cross-encoder: `CrossEncoderReranker(model=EttinCrossEncoder(load(ARTIFACT)))`.

    Args:
        runtime: what `load` returned; it stays the caller's to close.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def score(self, text_pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Scores of (query, document) pairs, see `predict`."""
        scores: list[float] = self.runtime.predict(list(text_pairs)).tolist()
        return scores
