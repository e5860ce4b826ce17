"""Comparison of scores. Everything takes and gives plain NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class ScoreError:
    """Difference of two score lists, in logits.

    Args:
        max_abs: largest |Δ|.
        mean_abs: mean |Δ|.
        spearman: rank correlation; None where a side is constant.
        worst: index of the pair with the largest |Δ|.
    """

    max_abs: float
    mean_abs: float
    spearman: float | None
    worst: int

    def figures(self) -> dict[str, float | None]:
        """What a result says of it."""
        return {"max_abs_error": self.max_abs, "mean_abs_error": self.mean_abs, "spearman": self.spearman}


def score_error(scores: ArrayLike, reference: ArrayLike) -> ScoreError:
    """Compares scores [pairs] with a reference [pairs]. A NaN counts as an infinite error."""
    found, expected = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    if found.shape != expected.shape or found.ndim != 1 or found.size == 0:
        raise ValueError(f"scores {found.shape} and reference {expected.shape} must be equal, one axis, not empty")
    error = np.abs(found - expected)
    error[~np.isfinite(error)] = np.inf
    return ScoreError(float(error.max()), float(error.mean()), spearman(found, expected), int(error.argmax()))


def average_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their ranks."""
    flat = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rank correlation; None where it is not defined (a constant side, a NaN, one value)."""
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(left).all() and np.isfinite(right).all()) or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(np.corrcoef(average_ranks(left), average_ranks(right))[0, 1])


def ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int = 10) -> float:
    """nDCG@k of one query with linear gains, as trec_eval computes it.

    Args:
        ranked: document ids, best first.
        gains: relevance by document id; absent means 0.
        k: cut-off.
    """
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    found = np.array([max(gains.get(each, 0.0), 0.0) for each in ranked[:k]])
    ideal = np.sort([gain for gain in gains.values() if gain > 0])[::-1][:k]
    if ideal.size == 0:
        return 0.0
    return float((found * discounts[: found.size]).sum() / (ideal * discounts[: ideal.size]).sum())
