"""Batches without padding, which all engines score, and how they are cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Tokenised pairs without padding.

    Args:
        ids: int32 [tokens], the pairs one after the other.
        cu_seqlens: int32 [pairs + 1], where each begins and the last ends.
        pad_token_id: the id of padding.
    """

    ids: Ids
    cu_seqlens: NDArray[np.int32]
    pad_token_id: int

    @classmethod
    def of(cls, sequences: Sequence[Ids], pad_token_id: int) -> "Batch":
        """Joins sequences, each int32 [its tokens]."""
        lengths = [0, *map(len, sequences)]
        ids = np.concatenate(sequences) if sequences else np.empty(0, np.int32)
        return cls(ids, np.cumsum(lengths, dtype=np.int32), pad_token_id)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest pair."""
        return int(np.diff(self.cu_seqlens).max(initial=0))

    def padded(self, multiple: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The batch with padding; the width is rounded up to a multiple of `multiple`.

        Returns:
            input_ids and attention_mask, int64 [pairs, width]; the mask is 1 for real tokens.
        """
        lengths = np.diff(self.cu_seqlens)
        width = round_up(self.longest, multiple)
        mask = np.arange(width) < lengths[:, None]
        input_ids = np.full(mask.shape, self.pad_token_id, np.int64)
        input_ids[mask] = self.ids
        return input_ids, mask.astype(np.int64)

    def laid_out(self, multiple: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The batch laid end to end, with padding at the end up to a multiple of `multiple` tokens.

        Returns:
            input_ids int64 [tokens], cu_seqlens int64 [pairs + 1].
        """
        input_ids = np.full(round_up(len(self.ids), multiple), self.pad_token_id, np.int64)
        input_ids[: len(self.ids)] = self.ids
        return input_ids, self.cu_seqlens.astype(np.int64)

    def packed(self) -> dict[str, NDArray[np.int64]]:
        """The inputs of a packed graph, int64: input_ids [tokens], cu_seqlens [pairs + 1], longest [longest]."""
        input_ids, cu_seqlens = self.laid_out()
        return {"input_ids": input_ids, "cu_seqlens": cu_seqlens, "longest": np.zeros(self.longest, np.int64)}


@dataclass(frozen=True)
class BatchLimits:
    """The batches that an engine takes.

    Args:
        concurrency: number of calls of `score` that make progress at the same time.
        batch_tokens: token budget of a batch, padding included.
        length_multiple: lengths are rounded up to this.
        batch_pairs: maximum number of pairs in a batch; None: no limit.
        in_parallel: whether concurrent calls compute at the same time, so that a little work is divided among them;
            False: they take turns on one device.
    """

    concurrency: int
    batch_tokens: int
    length_multiple: int = 1
    batch_pairs: int | None = None
    in_parallel: bool = True


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def cut(
    lengths: Sequence[int], max_tokens: int, multiple: int = 1, max_pairs: int | None = None
) -> Iterator[list[int]]:
    """Cuts pairs into batches of similar lengths by token budget, longest first.

    Args:
        lengths: tokens of each pair.
        max_tokens: budget of a batch, padding included; a longer pair has a batch of its own.
        multiple: the widths of batches are rounded up to this.
        max_pairs: maximum number of pairs in a batch.

    Yields:
        Indices into `lengths`, a batch at a time; every index once.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    start = 0
    while start < len(order):
        width = round_up(max(lengths[order[start]], 1), multiple)
        count = max(1, max_tokens // width)
        if max_pairs is not None:
            count = min(count, max_pairs)
        yield order[start : start + count]
        start += count
