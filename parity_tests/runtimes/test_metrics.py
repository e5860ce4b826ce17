import numpy as np
import pytest
import pytrec_eval
import scipy.stats

from ettin.artifacts.metrics import ndcg, score_error, spearman
from ettin.artifacts.tolerances import fp32_rule, reduced_rule


def test_spearman_is_scipys() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 9, (2, 50))
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)


def test_spearman_where_it_is_not_defined() -> None:
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, float("nan")], [1, 2]) is None


def test_ndcg_is_trec_evals() -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        ids = [f"d{at}" for at in range(30)]
        gains = {each: int(generator.integers(0, 4)) for each in ids[:12]} | {"unseen": 2}
        scores = generator.permutation(30).astype(float)
        run = {each: float(score) for each, score in zip(ids, scores, strict=True)}
        expected = pytrec_eval.RelevanceEvaluator({"q": gains}, {"ndcg_cut.10"}).evaluate({"q": run})["q"]
        ranked, judged = sorted(run, key=lambda each: -run[each]), {key: float(value) for key, value in gains.items()}
        assert ndcg(ranked, judged) == pytest.approx(expected["ndcg_cut_10"])
    assert ndcg(["a"], {}) == 0.0


def test_nan_is_an_infinite_error() -> None:
    error = score_error([1.0, float("nan")], [1.0, 2.0])
    assert error.max_abs == float("inf") and error.worst == 1
    assert not fp32_rule([float("nan")], [1.0])[0]
    assert not reduced_rule("bf16", [float("nan"), 1], [1, 1], [1.1, 1])[0]


def test_fp32_rule_is_relative_above_one() -> None:
    assert fp32_rule([10.0009, 0.00009], [10.0, 0.0])[0]
    assert not fp32_rule([10.0011, 0.0], [10.0, 0.0])[0]
    assert not fp32_rule([10.0, 0.00011], [10.0, 0.0])[0]


def test_reduced_rule_compares_means() -> None:
    gold, torch_bf16 = [0.0, 0.0], [0.1, 0.1]
    assert reduced_rule("bf16", [0.14, 0.14], gold, torch_bf16)[0]
    assert not reduced_rule("bf16", [0.16, 0.16], gold, torch_bf16)[0]
    assert not reduced_rule("fp16", [0.11, 0.11], gold, torch_bf16)[0]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        score_error([1.0], [1.0, 2.0])
