"""sentence-transformers' own evaluators on our runtimes, unchanged: metric for metric what CrossEncoder has."""

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.cross_encoder.evaluation import CrossEncoderNanoBEIREvaluator, CrossEncoderRerankingEvaluator

from ettin.artifacts.errors import UsageError
from ettin.export.proof_pairs import natural_pairs
from ettin.runtimes import load

Artifacts = dict[tuple[str, str], Path]
FP32 = [("onnx", "fp32"), ("openvino", "fp32"), ("transformers", "fp32")]


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    pairs = natural_pairs()
    documents = list(dict.fromkeys(pair.document for pair in pairs))
    queries = list(dict.fromkeys(pair.query for pair in pairs))[:10]
    positives = {query: [pair.document for pair in pairs if pair.query == query][:2] for query in queries}
    return [
        {"query": query, "positive": positives[query], "documents": documents[at : at + 15]}
        for at, query in enumerate(queries)
    ]


@pytest.fixture(scope="module", params=[True, False])
def judged(
    request: pytest.FixtureRequest, demo_gold: Any, samples: list[dict[str, Any]]
) -> tuple[CrossEncoderRerankingEvaluator, dict[str, float]]:
    """An evaluator, and the metrics of CrossEncoder."""
    always = request.param
    evaluator = CrossEncoderRerankingEvaluator(samples, name="own", always_rerank_positives=always, write_csv=False)
    return evaluator, evaluator(demo_gold)


@pytest.mark.parametrize("variant", FP32, ids="-".join)
def test_reranking_evaluator(demo_artifacts: Artifacts, judged: Any, variant: tuple[str, str]) -> None:
    evaluator, expected = judged
    with load(demo_artifacts[variant]) as runtime:
        found = evaluator(runtime)
        assert runtime.evaluations.metrics["own"].keys() >= {"own_map", "own_mrr@10", "own_ndcg@10"}
    assert found.keys() == expected.keys() and 0.05 < expected["own_ndcg@10"] < 0.999
    assert found == pytest.approx(expected, abs=1e-9)


def test_prompts_are_refused(demo_artifacts: Artifacts) -> None:
    with load(demo_artifacts["onnx", "fp32"]) as runtime, pytest.raises(UsageError, match="Ettin rerankers have none"):
        runtime.predict([("q", "d")], prompt_name="query")


@pytest.mark.hub
def test_nano_beir_evaluator(demo_artifacts: Artifacts, demo_gold: Any) -> None:
    evaluator = CrossEncoderNanoBEIREvaluator(["msmarco", "nfcorpus"], rerank_k=100, write_csv=False)
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        assert evaluator(runtime) == pytest.approx(evaluator(demo_gold), abs=1e-9)
