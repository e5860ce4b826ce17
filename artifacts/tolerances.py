"""Every tolerance of the project, and the rules that use them."""

import numpy as np
from numpy.typing import ArrayLike

from ettin.artifacts.metrics import ScoreError, score_error

# The rewriting is exact: float64 graph against float64 gold.
REWRITE_FLOAT64 = 1e-8

# A lowered fp32 artifact: |Δ| per pair, times max(1, |gold|). Loose limits hide a tanh GELU, a wrong epsilon,
# or weights silently stored as fp16.
FP32 = 1e-4

# bf16: mean |Δ| against that of PyTorch in bf16 on the same pairs; fp16 must do no worse than bf16 PyTorch.
REDUCED_RATIO = {"bf16": 1.5, "fp16": 1.0}
REDUCED_MIN_PAIRS = 200

# fp16 ends at 65504; an activation of gold over this is too close.
FP16_MAX_ACTIVATION = 32_000.0

# Pairs that travel in an artifact, at least.
MIN_PAIRS = 64


def fp32_rule(scores: ArrayLike, gold: ArrayLike) -> tuple[bool, str, ScoreError]:
    """Whether fp32 scores [pairs] are those of gold; the rule in words; the error."""
    error = score_error(scores, gold)
    expected = np.asarray(gold, np.float64)
    delta = np.abs(np.asarray(scores, np.float64) - expected)
    ok = bool((delta <= FP32 * np.maximum(1.0, np.abs(expected))).all())  # False for NaN
    return ok, f"max |Δ| ≤ {FP32:g} · max(1, |gold|)", error


def reduced_rule(
    precision: str, scores: ArrayLike, gold: ArrayLike, torch_bf16: ArrayLike
) -> tuple[bool, str, ScoreError]:
    """The same for bf16 and fp16, against what PyTorch in bf16 makes of the same pairs."""
    error, baseline = score_error(scores, gold), score_error(torch_bf16, gold)
    ratio = REDUCED_RATIO[precision]
    rule = f"mean |Δ| ≤ {ratio:g} × that of PyTorch bf16 ({baseline.mean_abs:.3g})"
    return error.mean_abs <= ratio * baseline.mean_abs, rule, error
