"""Ranking quality of a scorer over a retrieval set: rerank BM25's candidates, nDCG@10."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, kendalltau

from ettin.artifacts.metrics import mean_metrics, ndcg
from ettin.bench.beir import RetrievalSet

Scorer = Callable[[Sequence[tuple[str, str]]], NDArray[np.float32]]


@dataclass(frozen=True)
class Quality:
    """What reranking gave.

    Args:
        ndcg10: mean nDCG@10 over the queries.
        map: mean average precision over the candidates.
        mrr10: mean reciprocal rank, up to place 10.
        by_query: nDCG@10 by query id.
        scores: float32 [pairs], in the order of queries and candidates.
        seconds: time of scoring.
    """

    ndcg10: float
    map: float
    mrr10: float
    by_query: dict[str, float]
    scores: NDArray[np.float32]
    seconds: float


def rerank_quality(data: RetrievalSet, candidates: Mapping[str, list[str]], scorer: Scorer) -> Quality:
    """Scores every candidate and ranks by score; equal scores keep the first stage's order."""
    pairs = [(data.queries[query], data.documents[each]) for query, found in candidates.items() for each in found]
    start = time.perf_counter()
    scores = np.asarray(scorer(pairs), np.float32)
    seconds = time.perf_counter() - start
    rankings, at = [], 0
    for found in candidates.values():
        order = np.argsort(-scores[at : at + len(found)], kind="stable")
        rankings.append([found[place] for place in order])
        at += len(found)
    gains = [data.qrels[query] for query in candidates]
    by_query = {query: ndcg(ranked, each) for query, ranked, each in zip(candidates, rankings, gains, strict=True)}
    means = mean_metrics(rankings, gains)
    return Quality(means["ndcg10"], means["map"], means["mrr10"], by_query, scores, seconds)


def first_stage_ndcg(data: RetrievalSet, candidates: Mapping[str, list[str]]) -> float:
    """Mean nDCG@10 of the candidates as they are."""
    return float(np.mean([ndcg(found, data.qrels[query]) for query, found in candidates.items()]))


def change(found: Quality, reference: Quality) -> tuple[float, float, float]:
    """Change of the mean nDCG@10 against a reference, and its paired bootstrap interval over queries (95%).

    Returns:
        The change and both ends of the interval: percentiles of 10,000 resamples, seed 0.
    """
    differences = np.array([found.by_query[query] - value for query, value in reference.by_query.items()])
    return paired_change(differences)


def paired_change(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of paired differences [queries], and its bootstrap interval as `change` has it."""
    if np.ptp(differences) == 0:
        return (float(differences[0]),) * 3
    interval = bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(differences.mean()), float(interval.low), float(interval.high)


def kendall(scores: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Kendall's tau-b of two score lists."""
    return float(kendalltau(scores, reference).statistic)
