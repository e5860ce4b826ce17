"""All tolerances, and the rules that use them."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ettin.artifacts.metrics import ScoreError, ndcg, score_error, spearman

# The rewriting is exact: float64 graph against float64 gold.
REWRITE_FLOAT64 = 1e-8

# A lowered fp32 artifact: |Δ| per pair, times max(1, |gold|). Loose limits hide a tanh GELU, a wrong epsilon,
# or weights silently stored as fp16.
FP32 = 1e-4

# bf16 and fp16: limit of the mean |Δ|, as a multiple of that of PyTorch in bf16 on the same pairs.
REDUCED_RATIO = {"bf16": 1.5, "fp16": 1.0}
REDUCED_MIN_PAIRS = 200

# The largest fp16 number is 65504; an activation of gold over this is too close to it.
FP16_MAX_ACTIVATION = 32_000.0

# int8: ranks, not scores. nDCG@10 takes gold's own scores as gains: an export has no relevance labels for the user's
# model, and over the 44 queries of an artifact one swapped pair would change a labelled nDCG by 0.008, more than the
# limit. `ettin-bench quality` measures it with labels.
INT8_SPEARMAN = 0.99
INT8_NDCG_DROP = 0.005
INT8_MIN_CANDIDATES = 10  # of a query that is ranked

MIN_PAIRS = 64  # minimum number of parity pairs in an artifact


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
    """`fp32_rule` for bf16 and fp16, against the scores of PyTorch in bf16 for the same pairs."""
    error, baseline = score_error(scores, gold), score_error(torch_bf16, gold)
    ratio = REDUCED_RATIO[precision]
    rule = f"mean |Δ| ≤ {ratio:g} × that of PyTorch bf16 ({baseline.mean_abs:.3g})"
    return error.mean_abs <= ratio * baseline.mean_abs, rule, error


def int8_rule(
    scores: ArrayLike, gold: ArrayLike, queries: Sequence[str]
) -> tuple[bool, str, ScoreError, dict[str, float]]:
    """Whether int8 scores [pairs] rank as gold [pairs] does, and the ranking metrics; queries: of each pair."""
    error = score_error(scores, gold)
    actual, expected = np.asarray(scores, np.float64), np.asarray(gold, np.float64)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, query in enumerate(queries):
        groups[query].append(index)
    ndcgs, overlaps, ranks = [], [], []
    for members in (group for group in groups.values() if len(group) >= INT8_MIN_CANDIDATES):
        own, ideal = actual[members], expected[members]
        order, ideal_order = (np.argsort(-values, kind="stable").tolist() for values in (own, ideal))
        gains = {str(index): float(gain) for index, gain in enumerate(ideal - ideal.min())}
        ndcgs.append(ndcg([str(index) for index in order], gains))
        overlaps.append(len(set(order[:10]) & set(ideal_order[:10])) / 10)
        ranks.append(spearman(own, ideal) or 0.0)
    if not ndcgs:
        raise ValueError(f"no query has {INT8_MIN_CANDIDATES} candidates")
    figures = {
        "spearman": error.spearman or 0.0,
        "mean_spearman_per_query": float(np.mean(ranks)),
        "ndcg10_drop": float(1 - np.mean(ndcgs)),
        "top10_overlap": float(np.mean(overlaps)),
    }
    ok = figures["spearman"] >= INT8_SPEARMAN and figures["ndcg10_drop"] <= INT8_NDCG_DROP
    rule = (
        f"Spearman ≥ {INT8_SPEARMAN:g} over all pairs, nDCG@10 drop ≤ {INT8_NDCG_DROP:g} over {len(ndcgs)} queries "
        "with gold's scores as gains"
    )
    return bool(ok and np.isfinite(actual).all()), rule, error, figures
