"""Batches filled up to a size that recurs, in one buffer that is copied to a GPU at once."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ettin.runtimes.batch import Batch, round_up

_STEP = 64  # tokens; a multiple of 4, so that each part of the buffer begins at a multiple of 16 bytes
_LEAST_PAIRS, _LEAST_LONGEST = 8, 128


class Bucket(NamedTuple):
    """The size that a batch is filled up to, with sequences of padding after its own.

    No sequence sees another, so they change no score. Each of them is at most as long as the batch's longest.
    """

    tokens: int
    pairs: int
    longest: int

    @classmethod
    def exact(cls, batch: Batch) -> "Bucket":
        """The batch as it is."""
        return cls(len(batch.ids), len(batch), batch.longest)

    @classmethod
    def even(cls, batch: Batch) -> "Bucket":
        """At least one pair and one token more, so never one of either, which torch.compile treats as special."""
        return cls._of(batch, round_up(len(batch.ids) + 1, _STEP))

    @classmethod
    def recurring(cls, batch: Batch) -> "Bucket":
        """One of few: tokens in eight steps for each power of two, up to 1/8 more; pairs and longest powers of two."""
        tokens = len(batch.ids) + 1
        fitting = cls._of(batch, round_up(tokens, max(_STEP, _power_of_two(tokens) // 16)))
        return cls(
            fitting.tokens,
            max(_LEAST_PAIRS, _power_of_two(fitting.pairs)),
            max(_LEAST_LONGEST, _power_of_two(fitting.longest)),
        )

    @classmethod
    def _of(cls, batch: Batch, tokens: int) -> "Bucket":
        added = -(-(tokens - len(batch.ids)) // batch.longest)
        return cls(tokens, len(batch) + added, batch.longest)

    @property
    def size(self) -> int:
        """Elements of the buffer."""
        return 2 * self.tokens + self.pairs + 1

    def fill(self, batch: Batch, buffer: NDArray[np.int32]) -> None:
        """Writes ids, positions and bounds of a batch of this bucket, with padding, into a buffer of its size."""
        pairs, tokens, added = len(batch), len(batch.ids), self.pairs - len(batch)
        ids, positions, bounds = np.split(buffer, [self.tokens, 2 * self.tokens])
        ids[:tokens], ids[tokens:] = batch.ids, batch.pad_token_id
        bounds[: pairs + 1] = batch.cu_seqlens
        # Shared out evenly and rounded down: each added sequence begins before the end, as its first token is read.
        bounds[pairs + 1 :] = tokens + np.arange(1, added + 1) * (self.tokens - tokens) // max(added, 1)
        positions[:] = np.arange(self.tokens) - np.repeat(bounds[:-1], np.diff(bounds))

    def parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and positions, int32 [tokens], and bounds, int32 [pairs + 1], as views of a filled buffer."""
        return buffer[: self.tokens], buffer[self.tokens : 2 * self.tokens], buffer[2 * self.tokens :]


def _power_of_two(value: int) -> int:
    """The least power of two that is not below a positive value."""
    return 1 << (value - 1).bit_length()
