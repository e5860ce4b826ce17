"""Ranking quality: artifacts rerank a first stage's candidates, alone or beside PyTorch's reference in fp32.

Metrics of sets in BEIR form are ir-measures'; NanoBEIR is evaluated by sentence-transformers, as its published figures
were. Nothing here is tuned or calibrated on what it measures.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_measures
import numpy as np
from ir_measures import AP, RR, nDCG
from numpy.typing import NDArray
from scipy.stats import bootstrap, kendalltau

from ettin.artifacts.errors import DownloadError, MissingDependency, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.metrics import score_error
from ettin.bench.machine import about
from ettin.bench.report import NANOBEIR_NDCG10
from ettin.bench.workloads import RetrievalSet, bm25_candidates, read_beir
from ettin.runtimes import load
from ettin.runtimes.commands import console

NANOBEIR = Path("nanobeir")  # stands for the 13 sets, which come from the hub
REFERENCE = "reference, fp32"
Scorer = Callable[[Sequence[tuple[str, str]]], NDArray[np.float32]]
_MERGED: dict[str, Callable[[Any], float]] = {"seconds": sum, "max_abs_error": max}  # over sets; others: their mean


@dataclass(frozen=True)
class Quality:
    """What a ranking is worth."""

    means: dict[str, float]  # over queries: "ndcg10", "map" over the candidates, "mrr10"
    by_query: dict[str, float]  # nDCG@10 by query id
    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # of all candidates
    seconds: float = 0.0  # of scoring


@dataclass(frozen=True)
class Task:
    """One set and its candidates."""

    data: RetrievalSet
    candidates: Mapping[str, list[str]]  # document ids by query id, best first
    first_stage_ndcg10: float
    evaluator: Any = None  # sentence-transformers', whose means then count, on the same candidates

    def rerank(self, scorer: Scorer) -> Quality:
        """Scores every candidate and ranks by score; equal scores keep the first stage's order."""
        texts, queries = self.data.documents, self.data.queries
        pairs = [(queries[query], texts[key]) for query, keys in self.candidates.items() for key in keys]
        start = time.perf_counter()
        scores = np.asarray(scorer(pairs), np.float32)
        seconds = time.perf_counter() - start
        bounds = np.cumsum([len(keys) for keys in self.candidates.values()])
        rankings = {
            query: [keys[index] for index in np.argsort(-part, kind="stable")]
            for (query, keys), part in zip(self.candidates.items(), np.split(scores, bounds[:-1]), strict=True)
        }
        quality = replace(ranking_quality(self.data, rankings), scores=scores, seconds=seconds)
        if self.evaluator is None:
            return quality
        # The evaluator asks for the scores of these pairs in this order, and leaves its metrics with the model.
        ignored = SimpleNamespace(set_evaluation_metrics=lambda *_: None)
        found = self.evaluator(SimpleNamespace(predict=lambda *_, **__: scores, model_card_data=ignored))
        names = {"ndcg10": "ndcg@10", "map": "map", "mrr10": "mrr@10"}
        means = {key: float(found[f"{self.evaluator.name}_{name}"]) for key, name in names.items()}
        return replace(quality, means=means)


def ranking_quality(data: RetrievalSet, rankings: Mapping[str, list[str]]) -> Quality:
    """Quality of rankings: document ids by query id, best first."""
    # Places as scores: trec_eval would break ties of scores by document id.
    run = {query: {key: -float(place) for place, key in enumerate(keys)} for query, keys in rankings.items()}
    qrels = {query: data.qrels[query] for query in rankings}
    measures = {"ndcg10": nDCG @ 10, "map": AP, "mrr10": RR @ 10}
    means, rows = ir_measures.calc(list(measures.values()), qrels, run)
    by_query = {row.query_id: float(row.value) for row in rows if row.measure == nDCG @ 10}
    return Quality({name: float(means[measure]) for name, measure in measures.items()}, by_query)


def beir_task(folder: Path, split: str, candidates: int, queries: int | None) -> Task:
    """A set in BEIR form; candidates are the first ones by BM25."""
    data = read_beir(folder, split)
    with console.step(f"{data.name}: find candidates"):
        found = bm25_candidates(data, candidates, queries)
    return Task(data, found, ranking_quality(data, found).means["ndcg10"])


def nanobeir_tasks(candidates: int, queries: int | None) -> Iterator[Task]:
    """NanoBEIR's 13 sets from the hub; candidates are the relevant documents and the first ones by BM25."""
    try:
        from sentence_transformers.cross_encoder.evaluation import CrossEncoderNanoBEIREvaluator, nano_beir
    except ModuleNotFoundError as error:
        raise MissingDependency("NanoBEIR", str(error.name), "bench,export") from None
    for name in nano_beir.DATASET_NAME_TO_HUMAN_READABLE:
        try:
            with console.step(f"{name}: fetch"):
                (evaluator,) = CrossEncoderNanoBEIREvaluator([name], rerank_k=candidates, write_csv=False).evaluators
        except ValueError as error:
            raise DownloadError(f"NanoBEIR: not fetched ({error}). Or bring a set: --data DIR") from None
        evaluator.samples = samples = evaluator.samples[:queries]
        data = RetrievalSet(evaluator.name.partition("_")[0], {}, {}, {})
        found, both = {}, {}
        for sample in samples:
            key, positive = sample["query-id"], sample["positive"]
            found[key] = sample["documents"]
            data.queries[key], data.qrels[key] = sample["query"], dict.fromkeys(positive, 1)
            data.documents.update({text: text for text in (*positive, *found[key])})  # texts are their own ids
            both[key] = positive + [text for text in found[key] if text not in positive]
        yield Task(data, both, ranking_quality(data, found).means["ndcg10"], evaluator)


def measured_quality(
    artifacts: Sequence[Path], sets: Sequence[Path], *, split: str, candidates: int, queries: int | None,
    max_length: int, reference: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """The result of `ettin-bench quality`, whose options these are; of several sets their means, and each."""
    is_nano = NANOBEIR in sets and not NANOBEIR.is_dir()
    if is_nano and len(sets) > 1:
        raise UsageError("nanobeir goes with no other set: name it alone, --data nanobeir")
    settings = {"candidates": candidates, "max_length": max_length, "always_rerank_positives": is_nano}
    parts: list[dict[str, Any]] = []
    folders = (beir_task(folder, split, candidates, queries) for folder in sets)
    tasks = nanobeir_tasks(candidates, queries) if is_nano else folders
    for task in tasks:
        figures = {**settings, "data": task.data.name, "queries": len(task.candidates)}
        rows = task_rows(task, artifacts, max_length, reference)
        parts.append({**figures, "first_stage_ndcg10": task.first_stage_ndcg10, "rows": rows})
    if len(parts) == 1:
        return parts[0]
    rows = mean_rows(parts)
    for row, path in zip(rows[-len(artifacts) :], artifacts, strict=True) if is_nano else ():
        row["published_ndcg10"] = published_ndcg10(path)
    names = "NanoBEIR" if is_nano else " + ".join(part["data"] for part in parts)
    total, first_stage = (sum(part[key] for part in parts) for key in ("queries", "first_stage_ndcg10"))
    means = {"data": names, "queries": total, "first_stage_ndcg10": first_stage / len(parts)}
    return {**settings, **means, "rows": rows, "sets": parts}


def task_rows(task: Task, artifacts: Sequence[Path], max_length: int, reference: Path | None) -> list[dict[str, Any]]:
    """The figures of the reference, a checkpoint's folder, if there is one; and of each artifact."""
    rows: list[dict[str, Any]] = []
    gold: Quality | None = None
    if reference:
        import torch

        from ettin.export.reference import load_gold
        from ettin.export.source.checkpoint import read_checkpoint

        with console.step(f"{task.data.name}: rerank with the reference"):
            model = load_gold(read_checkpoint(reference))
            model.max_seq_length = max_length
            options = {"batch_size": 8, "activation_fn": torch.nn.Identity()}
            gold = task.rerank(lambda pairs: model.predict([list(pair) for pair in pairs], **options))
        rows.append({"artifact": REFERENCE, **quality_figures(gold, None)})
    for path in artifacts:
        with load(path) as runtime, console.step(f"{task.data.name}: rerank with {path}"):
            scorer = partial(runtime.predict, max_length=max_length, activation_fn="identity")
            rows.append({**about(runtime), **quality_figures(task.rerank(scorer), gold)})
    return rows


def quality_figures(quality: Quality, gold: Quality | None) -> dict[str, Any]:
    """What a result says of one ranker on one set, and against the reference, whose scores may be unknown."""
    figures: dict[str, Any] = {**quality.means, "seconds": quality.seconds, "ndcg10_by_query": quality.by_query}
    if gold is not None:
        figures |= change_figures([_differences(quality.by_query, gold.by_query)])
        figures |= score_error(quality.scores, gold.scores).figures()
        figures["kendall"] = float(kendalltau(quality.scores, gold.scores).statistic)
    return figures


def mean_rows(sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over sets, ranker by ranker; every set counts the same, as in NanoBEIR's mean."""
    means = []
    for rows in zip(*(part["rows"] for part in sets), strict=True):
        mean: dict[str, Any] = {key: rows[0][key] for key in ("artifact", "weights", "runtime") if key in rows[0]}
        for key in ("ndcg10", "map", "mrr10", "seconds", "max_abs_error", "spearman", "kendall"):
            values = [row.get(key) for row in rows]
            if None not in values:
                mean[key] = float(_MERGED.get(key, np.mean)(values))
        if all("ndcg10_change" in row for row in rows):
            pairs = zip(rows, (part["rows"][0] for part in sets), strict=True)
            by_query = [(row["ndcg10_by_query"], gold["ndcg10_by_query"]) for row, gold in pairs]
            mean |= change_figures([_differences(*pair) for pair in by_query])
        means.append(mean)
    return means


def _differences(by_query: Mapping[str, float], gold: Mapping[str, float]) -> NDArray[np.float64]:
    return np.array([by_query[query] - value for query, value in gold.items()])


def change_figures(differences: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Change of a mean nDCG@10 against a reference, and its paired bootstrap interval over queries (95 %).

    There is one array of differences for each set. The sets' means are averaged, queries are drawn within their set;
    the interval are percentiles of 10,000 resamples, seed 0.
    """
    change = low = high = float(np.mean([values.mean() for values in differences]))
    if any(np.ptp(values) > 0 for values in differences):

        def mean(*samples: NDArray[np.float64], axis: int = -1) -> Any:
            return sum(values.mean(axis=axis) for values in samples) / len(samples)

        rng = np.random.default_rng(0)
        options: dict[str, Any] = {"n_resamples": 10_000, "method": "percentile", "rng": rng, "vectorized": True}
        interval = bootstrap(tuple(differences), mean, **options).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"ndcg10_change": change, "ndcg10_change_95": [low, high]}


def published_ndcg10(artifact: Path) -> float | None:
    """NanoBEIR's mean published with the release, if these are its weights."""
    source = Manifest.read(artifact).source
    size = source.id.rsplit("/", 1)[-1].removeprefix("ettin-reranker-").removesuffix("-v1")
    return None if source.weights == "random" else NANOBEIR_NDCG10.get(size)
