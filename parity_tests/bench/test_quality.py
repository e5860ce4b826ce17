"""`ettin-bench quality`: metrics, sets, references and NanoBEIR."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderNanoBEIREvaluator,
    CrossEncoderRerankingEvaluator,
)

from ettin.artifacts.errors import DownloadError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.bench.cli import command
from ettin.bench.quality import (
    Task,
    change_figures,
    mean_rows,
    nanobeir_tasks,
    published_ndcg10,
    ranking_quality,
)
from ettin.bench.report import NANOBEIR_NDCG10
from ettin.bench.workloads import RetrievalSet, bm25_candidates, read_beir
from ettin.export import pipeline
from ettin.export.pipeline import Export, Job, Options
from ettin.export.proof_pairs import natural_pairs
from ettin.export.reference import load_gold
from ettin.export.source.checkpoint import read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import load

Artifacts = dict[tuple[str, str], Path]
DATA = RetrievalSet(
    "tiny/test", {f"d{index}": f"text {index}" for index in range(6)}, {"q1": "one", "q2": "two"},
    {"q1": {"d1": 1, "d5": 2, "d2": 0}, "q2": {"d0": 1}},
)  # fmt: skip


def write_set(folder: Path, name: str, questions: int) -> Path:
    """A set of the project's own kind of text; each question has one right document of twelve."""
    place = folder / name
    place.mkdir()
    documents = [f"The colour of planet {index} is number {index} of all." for index in range(12)]
    lines = [json.dumps({"_id": f"d{index}", "title": "", "text": text}) for index, text in enumerate(documents)]
    (place / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"q{index}", "text": f"colour of planet {index}"}) for index in range(questions)]
    (place / "queries.jsonl").write_text("\n".join(lines))
    rows = "".join(f"q{index}\td{index}\t1\n" for index in range(questions))
    (place / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return place


def measured(file: Path, *words: str | Path) -> Any:
    """The result of a run of the command."""
    arguments = ["quality", *map(str, words), "--json", str(file)]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(file.read_text())["result"]


def test_metrics_of_a_ranking() -> None:
    quality = ranking_quality(DATA, {"q1": ["d1", "d2", "d5"], "q2": ["d3", "d4"]})
    ideal = 2 + 1 / np.log2(3)
    assert quality.by_query == {"q1": pytest.approx((1 + 2 / np.log2(4)) / ideal), "q2": 0.0}
    assert quality.means["map"] == pytest.approx((1 + 2 / 3) / 2 / 2) and quality.means["mrr10"] == 0.5
    late = RetrievalSet("late", {}, {}, {"q": {"d10": 1}})
    assert ranking_quality(late, {"q": [f"d{index}" for index in range(11)]}).means["mrr10"] == 0


def test_equal_scores_keep_the_order_of_the_first_stage() -> None:
    task = Task(DATA, {"q1": ["d0", "d1", "d5"], "q2": ["d0", "d1"]}, 0.0)
    same = ranking_quality(DATA, dict(task.candidates))
    assert task.rerank(lambda pairs: np.zeros(len(pairs), np.float32)).by_query == same.by_query
    best = task.rerank(lambda pairs: np.array([0, 1, 2, 1, 0], np.float32))
    assert best.by_query == {"q1": 1.0, "q2": 1.0} and best.scores.tolist() == [0, 1, 2, 1, 0]


def test_metrics_are_the_evaluators(demo_artifacts: Artifacts, shared: Callable[[str], Path]) -> None:
    data = read_beir(shared("retrieval/cranfield"))
    candidates = bm25_candidates(data, 15, 10)
    # The evaluator knows relevant or not, and only what is among the candidates.
    judged = {
        query: {key: 1 for key in keys if data.qrels[query].get(key, 0) > 0} for query, keys in candidates.items()
    }
    candidates = {query: keys for query, keys in candidates.items() if judged[query]}
    data = RetrievalSet(data.name, data.documents, data.queries, judged)
    texts = data.documents
    samples = [
        {
            "query": data.queries[query],
            "positive": [texts[key] for key in judged[query]],
            "documents": [texts[key] for key in keys],
        }
        for query, keys in candidates.items()
    ]
    evaluator = CrossEncoderRerankingEvaluator(samples, name="c", always_rerank_positives=False, write_csv=False)
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        expected = evaluator(runtime)
        means = Task(data, candidates, 0.0).rerank(runtime.predict).means
    for key, name in (("map", "map"), ("mrr10", "mrr@10"), ("ndcg10", "ndcg@10")):
        assert means[key] == pytest.approx(expected[f"c_{name}"], abs=1e-9), key


@pytest.mark.parametrize(("queries", "documents"), [(2, 25), pytest.param(300, 100, marks=pytest.mark.slow)])
def test_scifact_ndcg_is_the_references(
    queries: int, documents: int, shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main job on real input: an artifact reranks SciFact as PyTorch does."""
    monkeypatch.setattr(pipeline, "proof_pairs", lambda extra, ranking: natural_pairs()[:64])  # SciFact is the proof
    checkpoint = read_checkpoint(shared("checkpoints/17m-lexical"))
    assert Export(checkpoint, Options(max_length=512)).run(Job("openvino", "fp32", tmp_path / "artifact"))
    data = read_beir(shared("retrieval/scifact"))
    candidates = bm25_candidates(data, documents, queries)
    assert len(candidates) == queries and all(len(keys) == documents for keys in candidates.values())
    task = Task(data, candidates, 0.0)
    with load(tmp_path / "artifact") as runtime:
        ours = task.rerank(runtime.predict)
    gold = load_gold(checkpoint)
    gold.max_seq_length = 512
    identity = torch.nn.Identity()
    reference = task.rerank(lambda pairs: gold.predict([list(pair) for pair in pairs], activation_fn=identity))
    assert abs(ours.means["ndcg10"] - reference.means["ndcg10"]) <= 0.001
    assert abs(ours.scores - reference.scores).max() <= 2e-3
    assert ours.means["ndcg10"] > 0 and ranking_quality(data, candidates).means["ndcg10"] > 0


def test_bootstrap_interval_is_paired() -> None:
    figures = change_figures([np.full(200, -0.01)])
    assert figures == {"ndcg10_change": pytest.approx(-0.01), "ndcg10_change_95": [pytest.approx(-0.01)] * 2}
    noise = np.random.default_rng(2).normal(0, 0.05, 200)
    figures = change_figures([noise])
    low, high = figures["ndcg10_change_95"]
    assert figures["ndcg10_change"] == pytest.approx(noise.mean()) and low < noise.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * noise.std() / 200**0.5, rel=0.1)


def test_interval_of_a_mean_over_sets_draws_within_them() -> None:
    generator = np.random.default_rng(0)
    small, large = generator.normal(0.1, 0.05, 50), generator.normal(-0.1, 0.05, 5000)
    figures = change_figures([small, large])
    assert figures["ndcg10_change"] == pytest.approx((small.mean() + large.mean()) / 2)  # each set counts the same
    error = (small.var() / 50 + large.var() / 5000) ** 0.5 / 2
    low, high = figures["ndcg10_change_95"]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_means_over_sets() -> None:
    def row(name: str, values: list[float], **more: float) -> dict[str, Any]:
        by_query = {f"q{index}": value for index, value in enumerate(values)}
        means = dict.fromkeys(("ndcg10", "map", "mrr10"), float(np.mean(values)))
        return {"artifact": name, **means, "seconds": 1.0, "ndcg10_by_query": by_query, **more}

    against = {"ndcg10_change": 0.0, "max_abs_error": 0.5, "spearman": 1.0, "kendall": 1.0}
    first = {"data": "a", "rows": [row("reference, fp32", [0.5, 0.7]), row("x/int8", [0.4, 0.6], **against)]}
    more = {**against, "max_abs_error": 0.25, "spearman": 0.5}
    second = {"data": "b", "rows": [row("reference, fp32", [1.0]), row("x/int8", [0.9], **more)]}
    reference, ours = mean_rows([first, second])
    assert reference["ndcg10"] == pytest.approx(0.8) and "ndcg10_change" not in reference
    assert ours["ndcg10_change"] == pytest.approx(-0.1) and ours["max_abs_error"] == 0.5 and ours["spearman"] == 0.75
    assert ours["seconds"] == 2


def test_beside_the_reference(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    data = write_set(tmp_path, "set", 3)
    fp32, int8 = (demo_artifacts["openvino", precision] for precision in ("fp32", "int8"))
    options = ("--data", data, "--candidates", 10)
    result = measured(tmp_path / "q.json", fp32, int8, *options, "--reference", DEMO_FOLDER)
    reference, ours, quantised = result["rows"]
    assert reference["artifact"] == "reference, fp32" and result["data"] == "set/test" and result["queries"] == 3
    assert ours["ndcg10"] == reference["ndcg10"] and ours["max_abs_error"] < 1e-4
    assert quantised["ndcg10_change_95"][0] <= quantised["ndcg10_change"] <= quantised["ndcg10_change_95"][1]


def test_several_sets(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    one, two = write_set(tmp_path, "one", 4), write_set(tmp_path, "two", 3)
    artifact, file = demo_artifacts["openvino", "fp32"], tmp_path / "q.json"
    result = measured(file, artifact, "--data", one, "--data", two, "--candidates", 5)
    assert result["data"] == "one/test + two/test" and result["queries"] == 7 and len(result["sets"]) == 2
    parts = [part["rows"][0]["ndcg10"] for part in result["sets"]]
    assert result["rows"][0]["ndcg10"] == pytest.approx(np.mean(parts)) and "spearman" not in result["rows"][0]
    with pytest.raises(UsageError, match="nanobeir goes with no other set"):
        measured(file, artifact, "--data", one, "--data", "nanobeir")


def test_parity_is_the_manifests(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts = [demo_artifacts[key] for key in (("openvino", "int8"), ("onnx", "fp32"))]
    for row, path in zip(measured(tmp_path / "p.json", *artifacts)["rows"], artifacts, strict=True):
        proven = Manifest.read(path).parity
        assert row["max_abs_error"] == proven.max_abs_error and row["status"] == "verified" and row["size_mib"] > 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """NanoBEIR in the form that the hub holds it."""
    planets: Mapping[str, Callable[[int], dict[str, Any]]] = {
        "corpus": lambda number: {"_id": f"d{number}", "text": f"planet {number}"},
        "queries": lambda number: {"_id": f"q{number}", "text": f"planet {number}"},
        "qrels": lambda number: {"query-id": f"q{number}", "corpus-id": f"d{number}"},
        "bm25": lambda number: {"query-id": f"q{number}", "corpus-ids": ["d9", "d8", "d0", "d1", "d7"]},
    }

    def load_dataset(_: str, subset: str, split: str) -> datasets.Dataset:
        assert split.startswith("Nano")
        return datasets.Dataset.from_list(
            [planets[subset](number) for number in range(30 if subset == "corpus" else 3)]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.usefixtures("hub")
def test_nanobeir_as_published(demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = demo_artifacts["openvino", "fp32"]
    monkeypatch.setattr("ettin.bench.quality.published_ndcg10", lambda path: 0.6746)
    result = measured(tmp_path / "n.json", artifact, "--data", "nanobeir", "--candidates", 4)
    assert result["data"] == "NanoBEIR" and len(result["sets"]) == 13 and result["always_rerank_positives"]
    assert result["sets"][0]["data"] == "NanoClimateFEVER" and result["queries"] == 39
    (row,) = result["rows"]
    assert row["published_ndcg10"] == 0.6746
    names = ["climatefever", "arguana"]
    evaluator = CrossEncoderNanoBEIREvaluator(names, rerank_k=4, write_csv=False)
    with load(artifact) as runtime:
        expected = evaluator(runtime)
    for key, name in (("ndcg10", "ndcg@10"), ("map", "map"), ("mrr10", "mrr@10")):
        assert row[key] == pytest.approx(expected[f"NanoBEIR_R4_mean_{name}"], abs=1e-9)
    part = result["sets"][0]["rows"][0]
    assert np.mean(list(part["ndcg10_by_query"].values())) == pytest.approx(part["ndcg10"])
    assert measured(tmp_path / "n.json", artifact, "--data", "nanobeir", "--queries", 1)["queries"] == 13


def test_nanobeir_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, split: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DownloadError, match=r"NanoBEIR: not fetched .* Or bring a set: --data DIR"):
        list(nanobeir_tasks(100, None))


@pytest.mark.hub
def test_nanobeir_from_the_hub() -> None:
    task = next(nanobeir_tasks(100, None))
    assert len(task.candidates) == 50 and all(len(keys) >= 100 for keys in task.candidates.values())


def test_published_means_are_the_released_weights_alone(
    demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = demo_artifacts["openvino", "fp32"]
    assert published_ndcg10(artifact) is None
    manifest = Manifest.read(artifact)
    source = manifest.source.model_copy(update={"id": "cross-encoder/ettin-reranker-68m-v1"})
    monkeypatch.setattr(Manifest, "read", lambda folder: manifest.model_copy(update={"source": source}))
    assert published_ndcg10(artifact) == NANOBEIR_NDCG10["68m"]
