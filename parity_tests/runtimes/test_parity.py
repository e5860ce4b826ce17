"""Lowered artifacts against gold: every target, precision and length."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import VARIANTS, in_a_child

from ettin.artifacts import tolerances
from ettin.artifacts.manifest import Manifest
from ettin.runtimes import Batch, Runtime, load
from ettin.runtimes.verify import verify

LENGTHS = [1, 63, 64, 65, 66, 127, 128, 129, 130, 191, 192, 193, 256, 257, 512, 513, 2048, 7999]
PAD = 8190


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def runtime(request: pytest.FixtureRequest, demo_artifacts: dict[tuple[str, str], Path]) -> Any:
    with load(demo_artifacts[request.param]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sequences() -> dict[int, np.ndarray]:
    generator = np.random.default_rng(3)
    return {length: generator.integers(0, 8187, length, dtype=np.int32) for length in LENGTHS}


@pytest.fixture(scope="module")
def gold(demo_gold: Any, sequences: dict[int, np.ndarray]) -> dict[int, float]:
    scores = {}
    with torch.inference_mode():
        for length, ids in sequences.items():
            row = torch.from_numpy(ids.astype(np.int64))[None]
            scores[length] = float(demo_gold({"input_ids": row, "attention_mask": torch.ones_like(row)})["scores"])
    return scores


def limit(precision: str, gold: float) -> float:
    """Per pair. Other precisions are judged as a whole at export; these bounds would see a broken mask or window."""
    bounds = {"fp32": tolerances.FP32 * max(1.0, abs(gold)), "int8": 0.75}
    return bounds.get(precision, 5 * 0.0625)  # five steps of bf16 at 8


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(runtime: Runtime, sequences: dict[int, np.ndarray], gold: dict[int, float], length: int) -> None:
    score = runtime.score(Batch.of([sequences[length]], PAD))
    assert score.dtype == np.float32 and score.shape == (1,)
    assert abs(float(score[0]) - gold[length]) <= limit(runtime.manifest.precision, gold[length]), (score, gold[length])


@pytest.mark.parametrize("longest", [66, 193, 513])
def test_in_a_mixed_batch(
    runtime: Runtime, sequences: dict[int, np.ndarray], gold: dict[int, float], longest: int
) -> None:
    assert_mixed_batch(runtime, sequences, gold, [length for length in LENGTHS if length <= longest])


def test_in_a_batch_with_a_long_one(runtime: Runtime, sequences: dict[int, np.ndarray], gold: dict[int, float]) -> None:
    assert_mixed_batch(runtime, sequences, gold, [1, 66, 193, 513, 2048])


def assert_mixed_batch(
    runtime: Runtime, sequences: dict[int, np.ndarray], gold: dict[int, float], lengths: list[int]
) -> None:
    scores = runtime.score(Batch.of([sequences[length] for length in lengths], PAD))
    assert np.isfinite(scores).all()
    for length, score in zip(lengths, scores, strict=True):
        assert abs(float(score) - gold[length]) <= limit(runtime.manifest.precision, gold[length]), length


def test_manifest_records_the_proof(runtime: Runtime) -> None:
    parity = runtime.manifest.parity
    assert parity.status == "verified" and parity.pairs >= tolerances.REDUCED_MIN_PAIRS
    limit = tolerances.INT8_SPEARMAN if runtime.manifest.precision == "int8" else 0.999
    assert parity.max_abs_error is not None and parity.spearman is not None and parity.spearman > limit
    assert runtime.arithmetic in parity.arithmetic


# Every target, and every rule that scores are judged by.
@pytest.mark.parametrize("variant", [("onnx", "fp32"), ("openvino", "int8"), ("transformers", "bf16")], ids="-".join)
def test_moved_artifact_verifies_again(
    demo_artifacts: dict[tuple[str, str], Path], variant: tuple[str, str], tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(demo_artifacts[variant], moved)
    found = verify(moved)
    assert found.ok, found.summary
    recorded = Manifest.read(moved).parity
    assert recorded.max_abs_error is not None
    assert found.parity.max_abs_error == pytest.approx(recorded.max_abs_error, rel=0.5, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_openvino_runs_one_thread_per_stream(demo_artifacts: dict[tuple[str, str], Path], precision: str) -> None:
    """OpenVINO 2026.4.1 dies with SIGFPE there on some bf16 graphs."""
    code = """
with load(sys.argv[1], threads=1) as runtime:
    print(runtime.predict([("red planet", "Mars " * count) for count in (1, 90, 700)]))
"""
    assert "nan" not in in_a_child(code, demo_artifacts["openvino", precision])


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_f32_arithmetic_is_said_where_bf16_is_missing(
    demo_artifacts: dict[tuple[str, str], Path], precision: str
) -> None:
    code = "with load(sys.argv[1]) as runtime: print(runtime.description, runtime.predict(('a', 'b')))"
    printed = in_a_child(code, demo_artifacts["openvino", precision], {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "PATH": ""})
    assert "f32" in printed and "bf16" not in printed


def test_first_inferences_from_many_threads(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    """OpenVINO's bindings deadlock when the first arrays of a process come from two threads at once."""
    code = """
from concurrent.futures import ThreadPoolExecutor
def work(_):
    with load(sys.argv[1]) as runtime:
        return runtime.predict([("red planet", "Mars")] * 4).tolist()
with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(work, range(8)))
print(max(abs(score - results[0][0]) for scores in results for score in scores) < 1e-5)
"""
    for _ in range(3):
        assert in_a_child(code, demo_artifacts["openvino", "fp32"]).strip() == "True"
