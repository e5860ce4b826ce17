"""Real weights against the golden and printed scores: `pytest -m hub` with a connection.

The same comparison runs here over a stand-in: goldens made from the embedded checkpoint.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ettin.artifacts import tolerances
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.source.resolve import opened
from ettin.export.source.sizes import SIZES
from ettin.runtimes import Runtime, load

TARGETS = ["onnx", "openvino", "transformers"]


def compare_with_goldens(runtime: Runtime, cases: list[dict[str, Any]], max_length: int) -> None:
    """Ids must be equal, scores within the fp32 tolerance."""
    for case in cases:
        ids = runtime.tokenizer.pairs([(case["query"], case["doc"])], max_length)[0]
        assert ids.tolist() == case["input_ids"], case["query"][:40]
        score, gold = float(runtime.predict((case["query"], case["doc"]))), case["score"][0]
        assert abs(score - gold) <= tolerances.FP32 * max(1.0, abs(gold)), (case["query"][:40], score, gold)


def compare_with_printed(runtime: Runtime, query: str, documents: list[str], printed: list[float]) -> None:
    """Scores as a blog post prints them: to their last digit, and their order."""
    scores = runtime.predict([(query, document) for document in documents])
    for score, shown in zip(scores.tolist(), printed, strict=True):
        digits = len(repr(shown).split(".")[1])
        assert abs(score - shown) <= max(0.51 * 10**-digits, 2e-3), (score, shown)
    hits = runtime.rank(query, documents)
    assert [hit["corpus_id"] for hit in hits] == np.argsort(-np.array(printed)).tolist()


@pytest.mark.hub
@pytest.mark.parametrize("target", TARGETS)
def test_17m_gives_the_golden_scores(target: str, shared: Callable[[str], Path], tmp_path: Path) -> None:
    goldens = json.loads(shared("goldens/ettin_reranker_17m_golden.json").read_text())
    with opened(size="17m") as checkpoint:
        Export(checkpoint, Options()).run(Job(target, "fp32", tmp_path / "artifact"))
    with load(tmp_path / "artifact") as runtime:
        compare_with_goldens(runtime, goldens["cases"], goldens["max_seq"])


@pytest.mark.hub
@pytest.mark.parametrize("size", ["32m", "68m"])
def test_scores_printed_with_the_release(size: str, shared: Callable[[str], Path], tmp_path: Path) -> None:
    cases = json.loads(shared("goldens/ettin_blog_examples.json").read_text())["cases"]
    chosen = [case for case in cases if case["model"] == SIZES[size].hub_id]
    assert chosen
    with opened(size=size) as checkpoint:
        Export(checkpoint, Options()).run(Job("openvino", "fp32", tmp_path / "artifact"))
    with load(tmp_path / "artifact") as runtime:
        for case in chosen:
            compare_with_printed(runtime, case["query"], case["docs"], case["scores"])


@pytest.mark.hub
@pytest.mark.parametrize("size", SIZES)
def test_released_checkpoints_are_read(size: str) -> None:
    with opened(size=size) as checkpoint:
        assert checkpoint.shape == SIZES[size].shape
        assert checkpoint.shape.num_parameters == SIZES[size].parameters
        assert checkpoint.activation == "identity" and checkpoint.max_length_tokens == 7999


STAND_IN = [
    ("What is the capital of France?", "Paris is the capital and most populous city of France."),
    ("", "an empty query still has to score"),
    ("a query with no matching document at all", ""),
    ("truncation", "The quick brown fox jumps over the lazy dog. " * 1200),
    ("quantization " * 1500, "int8 quantization reduces memory."),
]


MAX_LENGTH = 1000  # the comparison does not depend on it; two of the stand-ins are longer


@pytest.mark.parametrize("target", TARGETS)
def test_the_comparison_itself(target: str, demo_gold: Any, demo_artifacts: dict[tuple[str, str], Path]) -> None:
    demo_gold.max_seq_length = MAX_LENGTH
    cases = [
        {
            "query": query,
            "doc": document,
            "input_ids": demo_gold.preprocess([[query, document]])["input_ids"][0].tolist(),
            "score": [float(demo_gold.predict([query, document]))],
        }
        for query, document in STAND_IN
    ]
    assert [len(case["input_ids"]) for case in cases].count(MAX_LENGTH) == 2
    with load(demo_artifacts[target, "fp32"], max_length=MAX_LENGTH) as runtime:
        compare_with_goldens(runtime, cases, MAX_LENGTH)
        query, documents = STAND_IN[0][0], [STAND_IN[0][1], "Berlin is the capital of Germany."]
        printed = [round(float(demo_gold.predict([query, document])), 2) for document in documents]
        compare_with_printed(runtime, query, documents, printed)
        cases[0]["score"] = [cases[0]["score"][0] + 0.01]
        with pytest.raises(AssertionError):
            compare_with_goldens(runtime, cases, MAX_LENGTH)
        with pytest.raises(AssertionError):
            compare_with_printed(runtime, query, documents, [printed[0] + 0.1, printed[1]])


def test_golden_ids_are_ours(shared: Callable[[str], Path]) -> None:
    """The tokenizer half of the golden file needs no weights."""
    from ettin.runtimes.tokenizer import PairTokenizer

    goldens = json.loads(shared("goldens/ettin_reranker_17m_golden.json").read_text())
    tokenizer = PairTokenizer(shared("tokenizer/tokenizer.json"))
    for case in goldens["cases"]:
        found = tokenizer.pairs([(case["query"], case["doc"])], goldens["max_seq"])[0]
        assert found.tolist() == case["input_ids"], case["query"][:40]
