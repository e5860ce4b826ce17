"""Ranking quality of a scorer over retrieval sets: rerank a first stage's candidates; nDCG@10, MAP, MRR@10."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, kendalltau

from ettin.artifacts.metrics import mean_metrics, ndcg, score_error
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


def with_positives(data: RetrievalSet, candidates: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The candidates, then what is relevant and was not found: quality of the reranker alone.

    Source: `always_rerank_positives` of sentence-transformers' evaluators, with which NanoBEIR's figures are published.
    """
    return {
        query: found + [each for each, gain in data.qrels[query].items() if gain > 0 and each not in set(found)]
        for query, found in candidates.items()
    }


def row(found: Quality, gold: Quality | Mapping[str, float] | None) -> dict[str, Any]:
    """The figures of one ranker on one set, and against the reference, if there is one.

    Args:
        found: the ranker's.
        gold: the reference's; or its nDCG@10 by query alone, then errors of scores are not known.
    """
    figures = {
        "ndcg10": found.ndcg10, "map": found.map, "mrr10": found.mrr10, "seconds": found.seconds,
        "ndcg10_by_query": found.by_query,
    }  # fmt: skip
    if gold is None:
        return figures
    by_query = gold.by_query if isinstance(gold, Quality) else gold
    moved, low, high = change(found, by_query)
    against = {"ndcg10_change": moved, "ndcg10_change_95": [low, high]}
    if not isinstance(gold, Quality):
        return {**figures, **against}
    tau = kendall(found.scores, gold.scores)
    return {**figures, **against, **score_error(found.scores, gold.scores).figures(), "kendall": tau}


def mean_rows(sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over sets, ranker by ranker; every set counts the same, as in NanoBEIR's mean.

    Args:
        sets: each {"data": name, "rows": [{"artifact": name, **row(…)}, …]}, the same rankers in each.
    """
    means = []
    for rows in zip(*(each["rows"] for each in sets), strict=True):
        mean: dict[str, Any] = {key: rows[0][key] for key in ("artifact", "weights", "runtime") if key in rows[0]}
        mean |= {key: float(np.mean([each[key] for each in rows])) for key in ("ndcg10", "map", "mrr10")}
        mean["seconds"] = sum(each["seconds"] for each in rows)
        mean["ndcg10_by_query"] = {
            f"{each['data']}: {query}": value
            for each, of in zip(sets, rows, strict=True)
            for query, value in of["ndcg10_by_query"].items()
        }
        if all("ndcg10_change" in each for each in rows):
            references = [each["rows"][0]["ndcg10_by_query"] for each in sets]
            differences = [
                _differences(each["ndcg10_by_query"], gold) for each, gold in zip(rows, references, strict=True)
            ]
            moved, low, high = paired_change(differences)
            mean |= {"ndcg10_change": moved, "ndcg10_change_95": [low, high]}
        if all("max_abs_error" in each for each in rows):
            mean["max_abs_error"] = max(each["max_abs_error"] for each in rows)
            mean |= {key: float(np.mean([each[key] for each in rows])) for key in ("spearman", "kendall")}
        means.append(mean)
    return means


def change(found: Quality, reference: Mapping[str, float]) -> tuple[float, float, float]:
    """Of the mean nDCG@10 on one set, against the reference's by query; see `paired_change`."""
    return paired_change([_differences(found.by_query, reference)])


def _differences(found: Mapping[str, float], reference: Mapping[str, float]) -> NDArray[np.float64]:
    return np.array([found[query] - value for query, value in reference.items()])


def paired_change(differences: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Change of a mean nDCG@10 against a reference, and its paired bootstrap interval over queries (95 %).

    Args:
        differences: for each set, one a query; the sets' means are averaged, queries are drawn within their set.

    Returns:
        The change and both ends of the interval: percentiles of 10,000 resamples, seed 0.
    """
    moved = float(np.mean([each.mean() for each in differences]))
    if all(np.ptp(each) == 0 for each in differences):
        return (moved,) * 3

    def mean(*samples: NDArray[np.float64], axis: int = -1) -> Any:
        return sum(each.mean(axis=axis) for each in samples) / len(samples)

    interval = bootstrap(
        tuple(differences), mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    return moved, float(interval.low), float(interval.high)


def kendall(scores: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Kendall's tau-b of two score lists."""
    return float(kendalltau(scores, reference).statistic)
