"""Platt scaling: relevance probabilities from logits, fitted on labelled pairs."""

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.errors import InputError
from ettin.artifacts.score_calibration import Reliability, ScoreCalibration
from ettin.runtimes.arguments import sigmoid

Floats = NDArray[np.float64]

_FOLDS = 5
_BINS = 10
_LEAST_OF_EACH = 20  # labels of either kind: fewer say little about two parameters
_STEPS = 100


def fitted(logits: NDArray[np.float32], labels: NDArray[np.bool_]) -> ScoreCalibration:
    """Fits a slope and an offset, so that sigmoid(slope · logit + offset) is the probability of relevance.

    Args:
        logits: raw, float32 [pairs].
        labels: bool [pairs], whether the document answers the query.

    Returns:
        The fit on all pairs. Its figures after calibration are those of pairs that took no part in the fit: each fifth
        of the pairs is judged by the fit on the others.

    Raises:
        InputError: too few pairs of either label, or logits that do not rise with relevance.
    """
    relevant = int(labels.sum())
    if min(relevant, len(labels) - relevant) < _LEAST_OF_EACH:
        raise InputError(
            f"{relevant} relevant and {len(labels) - relevant} other pairs, expected at least {_LEAST_OF_EACH} of each"
        )
    if infinite := int((~np.isfinite(logits)).sum()):
        raise InputError(f"{infinite} of {len(logits)} logits are not finite. Verify the artifact here: ettin-verify")
    values = logits.astype(np.float64)
    slope, offset = _platt(values, labels)
    if slope <= 0:
        raise InputError(
            f"logits do not rise with relevance (slope {slope:.3g}, expected above 0). Check the labels: 1 is relevant"
        )
    folds = np.random.default_rng(0).permutation(len(labels)) % _FOLDS
    held_out = np.empty_like(values)
    for fold in range(_FOLDS):
        part = folds == fold
        fold_slope, fold_offset = _platt(values[~part], labels[~part])
        held_out[part] = fold_slope * values[part] + fold_offset
    return ScoreCalibration(
        slope=slope,
        offset=offset,
        pairs=len(labels),
        relevant=relevant,
        before=reliability(sigmoid(logits), labels),
        after=reliability(sigmoid(held_out.astype(np.float32)), labels),
    )


def reliability(probabilities: NDArray[np.float32], labels: NDArray[np.bool_]) -> Reliability:
    """Brier score and expected calibration error (ten bins of equal width)."""
    values = probabilities.astype(np.float64)
    bins = np.minimum((values * _BINS).astype(int), _BINS - 1)
    error = np.abs(np.bincount(bins, values, _BINS) - np.bincount(bins, labels, _BINS)).sum() / len(labels)
    return Reliability(brier=float(np.mean((values - labels) ** 2)), expected_calibration_error=float(error))


def _platt(logits: Floats, labels: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset of the greatest likelihood, by Newton's method with halved steps.

    Source: Lin, Lin and Weng, "A note on Platt's probabilistic outputs" (2007). Its targets, which are not quite 0 and
    1, keep the slope finite where the labels can be separated.
    """
    relevant = int(labels.sum())
    targets = np.where(labels, (relevant + 1) / (relevant + 2), 1 / (len(labels) - relevant + 2))
    scale = max(float(logits.std()), 1e-6)
    rows = np.stack([(logits - logits.mean()) / scale, np.ones_like(logits)])
    weights = np.zeros(2)

    def loss(candidate: Floats) -> float:
        margins = candidate @ rows
        return float((np.logaddexp(0, margins) - targets * margins).sum())

    for _ in range(_STEPS):
        probabilities = 1 / (1 + np.exp(-np.clip(weights @ rows, -500, 500)))
        gradient = rows @ (probabilities - targets)
        curvature = (rows * probabilities * (1 - probabilities)) @ rows.T + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-10 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if np.abs(step).max() < 1e-10:
            break
    slope = weights[0] / scale
    return float(slope), float(weights[1] - slope * logits.mean())
