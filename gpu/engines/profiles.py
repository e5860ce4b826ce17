"""Optimisation profiles: the shapes that an engine of the packed graph is compiled for, and how a batch meets one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.errors import ShapeError
from ettin.artifacts.manifest import ShapeRange
from ettin.runtimes.batch import Batch, round_up

Profile = dict[str, ShapeRange]

# Limits of one batch, padding included: large enough to keep the largest GPUs busy with the smallest size, and within
# 8 GB of GPU memory with the largest (computed from the graph's activations, not measured).
BATCH_TOKENS = 32768
BATCH_PAIRS = 1024

# A profile's kernels and memory are those of its largest shapes. A batch of pairs up to `longest` tokens has at most
# BATCH_TOKENS / (the class below) pairs. So four classes bound the memory of the gathered global attention to four
# times the budget, and a short batch does not pay for a long one.
_LONGEST = (128, 512, 2048)
_SHORTEST = 32  # the class below the first
_SMALL = (16, 1024)  # pairs and tokens of a single request

# Shapes are rounded up so that they recur: a known shape runs as one CUDA graph, and kernels are compiled for fewer
# shapes. Batches are filled up with pad tokens, and with pairs of one pad token.
_TOKENS_MULTIPLE = 256
LONGEST_MULTIPLE = 64
_PAIRS_MULTIPLE = 8


def profiles(max_length: int) -> list[Profile]:
    """Optimisation profiles, smallest first: the runtime takes the first that a batch fits."""
    classes = [*(longest for longest in _LONGEST if longest < max_length), max_length]
    pairs, tokens = _SMALL
    return [_profile(pairs, tokens, min(tokens, max_length))] + [
        _profile(min(BATCH_PAIRS, BATCH_TOKENS // below), BATCH_TOKENS, longest)
        for below, longest in zip((_SHORTEST, *classes), classes, strict=False)
    ]


def _profile(pairs: int, tokens: int, longest: int) -> Profile:
    limits = {"input_ids": (1, tokens), "cu_seqlens": (2, pairs + 1), "longest": (1, longest)}
    return {
        name: ShapeRange(min=(least,), opt=(max(least, most // 2),), max=(most,))
        for name, (least, most) in limits.items()
    }


@dataclass(frozen=True)
class Shape:
    """The rounded lengths of one inference, and the optimisation profile that it runs in."""

    profile: int
    tokens: int
    pairs: int
    longest: int

    @property
    def inputs(self) -> dict[str, int]:
        """The length of each of the engine's inputs."""
        return {"input_ids": self.tokens, "cu_seqlens": self.pairs + 1, "longest": self.longest}


class Profiles:
    """The optimisation profiles of an engine, smallest first."""

    def __init__(self, profiles: Sequence[Profile], pad_token_id: int) -> None:
        self.profiles, self.pad_token_id = profiles, pad_token_id

    def most(self, name: str) -> int:
        """Maximum length of an input in any profile."""
        return max(profile[name].max[0] for profile in self.profiles)

    def shape(self, batch: Batch) -> Shape:
        """The batch, rounded up within the first profile that holds it; raises `ShapeError` if none does."""
        pairs, tokens, longest = len(batch), len(batch.ids), batch.longest
        for number, profile in enumerate(self.profiles):
            limits = [profile[name].max[0] for name in ("input_ids", "cu_seqlens", "longest")]
            if tokens <= limits[0] and pairs + 1 <= limits[1] and longest <= limits[2]:
                room = min(round_up(pairs, _PAIRS_MULTIPLE), limits[1] - 1) - pairs
                # Added pairs are one pad token each.
                whole = min(round_up(tokens + room, _TOKENS_MULTIPLE), limits[0])
                room = min(room, whole - tokens)
                return Shape(number, whole, pairs + room, min(round_up(longest, LONGEST_MULTIPLE), limits[2]))
        raise ShapeError(
            f"a batch of {pairs} pairs, {tokens} tokens, the longest of {longest}, is more than the engine was "
            f"compiled for: {self.most('cu_seqlens') - 1} pairs, {self.most('input_ids')} tokens. Use predict, which "
            "cuts batches"
        )

    def fill(self, batch: Batch, shape: Shape, ids: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
        """Writes the rounded batch into ids [shape.tokens] and bounds [shape.pairs + 1]."""
        pairs, tokens = len(batch), len(batch.ids)
        ids[:tokens] = batch.ids
        ids[tokens:] = self.pad_token_id
        bounds[: pairs + 1] = batch.cu_seqlens
        bounds[pairs + 1 :] = tokens + 1 + np.arange(shape.pairs - pairs)
