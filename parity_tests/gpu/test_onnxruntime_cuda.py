"""The path of ONNX Runtime on a GPU, with the CPU's provider in its place."""

import logging
from pathlib import Path

import numpy as np
import pytest

from ettin.artifacts.errors import UsageError
from ettin.gpu.engines.onnxruntime_cuda import CudaOnnxRuntime
from ettin.gpu.marks import mark
from ettin.runtimes import load, loading

PAIRS = [("What is the red planet?", "Mars " * count) for count in (1, 5, 200, 40, 2)] * 4


@pytest.fixture
def artifact(demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(CudaOnnxRuntime, "provider", "CPUExecutionProvider")
    monkeypatch.setattr(CudaOnnxRuntime, "memory", "cpu")
    return demo_artifacts["onnx", "fp32"]


def test_scores_are_those_of_the_cpu(artifact: Path) -> None:
    with load(artifact, device="cuda") as runtime, load(artifact) as other:
        assert isinstance(runtime, CudaOnnxRuntime) and not isinstance(other, CudaOnnxRuntime)
        assert runtime.limits.batch_tokens == 65536 and runtime.limits.concurrency == 1
        np.testing.assert_allclose(runtime.predict(PAIRS), other.predict(PAIRS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("setting", ["threads", "streams"])
def test_settings_of_a_cpu_are_refused(artifact: Path, setting: str) -> None:
    with pytest.raises(UsageError, match=f"{setting}: target 'onnx' on device 'cuda' has no such setting"):
        load(artifact, device="cuda", **{setting: 1})  # type: ignore[arg-type]


def test_an_experimental_path_is_logged_once(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "_announced", set())
    for device in ("cpu", "cuda", "cuda"):
        with caplog.at_level(logging.WARNING, "ettin.load"), load(artifact, device=device):
            pass
    command = f"ettin-verify {artifact} --device cuda"
    line = "target 'onnx' on device 'cuda' is experimental: not yet run on a GPU. Compare its scores with the reference"
    expected = [f"{line} here: {command}"] if mark("onnx.cuda") else []
    assert [record.getMessage() for record in caplog.records if record.name == "ettin.load"] == expected
