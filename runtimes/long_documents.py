"""What happens to documents that, with their query, are longer than the model reads."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.errors import UsageError

POLICIES = ("truncate", "chunks")


@dataclass(frozen=True)
class LongDocuments:
    """How documents that do not fit into `max_length` tokens with their query are scored.

    Args:
        long_documents: "truncate": the end of the pair is cut, as CrossEncoder does it. "chunks": the document is cut
            into overlapping chunks that are scored with the same query; the first is what "truncate" scores.
        chunk_overlap: tokens that neighbouring chunks share; at most half a chunk is used.
        top_chunks: the score is the mean of the logits of so many chunks, the best ones; 1: the maximum.
        max_tokens_per_doc: a document's own tokens are cut to this number first; None: they are not.

    Raises:
        UsageError: a value out of its range.
    """

    long_documents: str = "truncate"
    chunk_overlap: int = 64
    top_chunks: int = 1
    max_tokens_per_doc: int | None = None

    def __post_init__(self) -> None:
        if self.long_documents not in POLICIES:
            raise UsageError(f"unknown long_documents '{self.long_documents}', expected one of: {', '.join(POLICIES)}")
        for name, least in (("chunk_overlap", 0), ("top_chunks", 1), ("max_tokens_per_doc", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}, expected {least} or more")

    @classmethod
    def of(cls, value: "LongDocuments | str | None") -> "LongDocuments":
        """For an argument: None is the default, a string a policy."""
        return value if isinstance(value, LongDocuments) else cls(value or "truncate")

    def updated(self, values: Mapping[str, Any]) -> Self:
        """A copy with those of `values` that are fields and not None; numbers may be text."""
        given = taken(dict(values))
        for name in given.keys() - {"long_documents"}:
            try:
                given[name] = int(str(given[name]))
            except ValueError:
                raise UsageError(f"{name} is {given[name]!r}, expected a whole number") from None
        return replace(self, **given)

    @property
    def has_chunks(self) -> bool:
        """Whether long documents are cut into chunks."""
        return self.long_documents == "chunks"

    def starts(self, tokens: int, size: int) -> list[int]:
        """Where the chunks of a document begin.

        Args:
            tokens: of the document.
            size: tokens of a chunk; all chunks are full, so the last one may overlap more.
        """
        if not self.has_chunks or tokens <= size or size == 0:
            return [0]
        return [*range(0, tokens - size, size - min(self.chunk_overlap, size // 2)), tokens - size]


def taken(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the options that are fields of `LongDocuments`, and returns those of them that are not None."""
    values = {field.name: options.pop(field.name, None) for field in fields(LongDocuments)}
    return {name: value for name, value in values.items() if value is not None}


def combined(logits: NDArray[np.float32], owners: NDArray[np.int64], top: int) -> NDArray[np.float32]:
    """Scores of documents from those of their chunks.

    Args:
        logits: float32 [chunks].
        owners: int64 [chunks], the document of each; every document has one.
        top: number of best chunks whose mean is the score.
    """
    order = np.lexsort((-logits, owners))
    logits, owners = logits[order], owners[order]
    firsts = np.flatnonzero(np.diff(owners, prepend=-1))
    best = np.arange(len(owners)) - firsts[owners] < top
    return (np.bincount(owners[best], logits[best]) / np.bincount(owners[best])).astype(np.float32)
