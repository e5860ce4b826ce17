"""ONNX Runtime's TensorRT-RTX provider, as far as a machine without a GPU goes: its real library, no engine."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from support import reseal
from support import rewrite as rewrite_manifest

from ettin.artifacts.errors import ArtifactError, HardwareError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.targets.to_onnx import packed_onnx
from ettin.export.writer import PACKED, rewrite
from ettin.gpu.engines.onnxruntime_cuda import CudaOnnxRuntime
from ettin.gpu.engines.onnxruntime_trt_rtx import TrtRtxOnnxRuntime, provider_options
from ettin.gpu.engines.profiles import BATCH_TOKENS, profiles
from ettin.runtimes import load
from ettin.runtimes.base import Settings
from ettin.runtimes.commands import triton
from ettin.runtimes.machine import gpus
from ettin.runtimes.verify import verify

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="needs the `onnx-trt-rtx` extra")
# What the provider takes from the driver.
DRIVER = """
cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCurrent cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCurrent
cuDestroyExternalMemory cuDestroyExternalSemaphore cuExternalMemoryGetMappedBuffer cuFuncSetAttribute cuGetErrorName
cuGetErrorString cuImportExternalMemory cuImportExternalSemaphore cuInit cuLaunchKernel cuModuleGetFunction
cuModuleLoadData cuModuleUnload cuSignalExternalSemaphoresAsync cuStreamGetCtx cuWaitExternalSemaphoresAsync
nvmlErrorString nvmlInit_v2 nvmlShutdown nvmlSystemGetDriverVersion
"""
without_gpu = pytest.mark.skipif(bool(gpus()), reason="is about machines without a GPU")


@pytest.fixture(scope="module")
def artifact(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bf16") / "artifact"
    export = Export(demo, Options(max_length=256, allow_unverified=True))
    assert export.run(Job("onnx", "bf16", output)) is None
    return output


def test_artifact_is_the_packed_graph_and_unverified(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    assert manifest.parity.status == "unverified" and manifest.needs.device == "trt-rtx"
    assert manifest.interface == PACKED and manifest.entry == "onnx/model_bf16.onnx" and manifest.experimental
    card = (artifact / "README.md").read_text()
    assert '"ettin-export[onnx-trt-rtx]"' in card and "transformers.js" not in card


def test_nothing_is_published_without_the_flag(demo: Checkpoint, tmp_path: Path) -> None:
    job = Job("onnx", "bf16", tmp_path / "artifact")
    with pytest.raises(HardwareError, match="multiplies no matrices in bf16.*'trt-rtx'.*--allow-unverified"):
        Export(demo, Options()).check([job])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_other_device_takes_its_place(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """With a provider that would start in the place of CUDA's, so that nothing else refuses."""
    monkeypatch.setattr(CudaOnnxRuntime, "provider", "CPUExecutionProvider")
    expected = f"onnx bf16 runs on device 'trt-rtx' alone, not on '{device}'"
    with pytest.raises(UsageError, match=expected):
        load(artifact, device=device, allow_unverified=True)
    proven = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    rewrite_manifest(proven, lambda content: content["parity"].update(status="verified", pairs=64))
    done = CliRunner().invoke(
        triton.command, [str(proven), "--repository", str(tmp_path / "models"), "--device", device]
    )
    assert isinstance(done.exception, UsageError) and expected in str(done.exception)
    assert not (tmp_path / "models").exists()


@without_gpu
def test_without_a_driver(artifact: Path) -> None:
    """The real library; verifying takes the artifact's own device."""
    with pytest.raises(HardwareError, match=r"can't load NVIDIA's .* \(lib\S+: cannot open .*CUDA 13.*Run: nvidia-smi"):
        verify(artifact)


@without_gpu
def test_without_a_card(artifact: Path, tmp_path: Path) -> None:
    """The real library over a driver that has no GPU, as in a container that was started without one."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, for a stand-in of the driver")
    source = tmp_path / "driver.c"
    source.write_text("".join(f"int {symbol}(void) {{ return 100; }}\n" for symbol in DRIVER.split()))  # no device
    for library in ("libcuda.so.1", "libnvidia-ml.so.1"):
        words = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(tmp_path / library), str(source)]
        subprocess.run(words, check=True)
    code = f"""
from ettin.runtimes import load

try:
    load({str(artifact)!r}, allow_unverified=True)
finally:
    print(open("/proc/self/maps").read())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "HardwareError: device 'trt-rtx': TensorRT-RTX found no GPU that it runs on (sm_86" in done.stderr
    assert "GPUs here: none. Run: nvidia-smi" in done.stderr
    # Its own CUDA runtime: elsewhere there may be none.
    assert "/onnxruntime_ep_nv_tensorrt_rtx/libcudart.so." in done.stdout


def test_a_padded_artifact_is_refused(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(UsageError, match="runs packed graphs, .* is padded fp32. Export: .* --precision bf16"):
        load(demo_artifacts["onnx", "fp32"], device="trt-rtx")


def test_settings_are_checked(artifact: Path) -> None:
    for name in ("threads", "streams"):
        with pytest.raises(UsageError, match=f"{name}: target 'onnx' on device 'trt-rtx' has no such setting"):
            load(artifact, allow_unverified=True, **{name: 2})
    with pytest.raises(UsageError, match=f"batch_tokens is 99999, the engine is built for at most {BATCH_TOKENS}"):
        load(artifact, allow_unverified=True, batch_tokens=99999)


def test_triton_serves_it_in_our_runtime(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient", reason="needs the `triton` extra")
    from ettin.runtimes.triton.repository import TritonOptions, publish

    with pytest.raises(UsageError, match="run on cpu and cuda, not on 'trt-rtx'. Leave out --native"):
        publish(artifact, tmp_path, "model", TritonOptions(native=True))


def test_provider_options(tmp_path: Path) -> None:
    options = provider_options(profiles(512), tmp_path)
    assert options["nv_runtime_cache_path"] == str(tmp_path) and "nv_runtime_cache_path" not in provider_options(
        [], None
    )
    assert options["nv_profile_max_shapes"].startswith("input_ids:1024,cu_seqlens:17,longest:512,input_ids:32768,")
    assert {len(options[f"nv_profile_{kind}_shapes"].split(",")) for kind in ("min", "opt", "max")} == {9}


class OnCpu(TrtRtxOnnxRuntime):
    """What runs on the GPU, with ONNX Runtime's CPU provider in the place of NVIDIA's."""

    provider = "CPUExecutionProvider"

    def providers(self, options: ort.SessionOptions, settings: Settings) -> Any:
        return [self.provider]


def test_scores_of_rounded_batches(
    artifact: Path, demo: Checkpoint, demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """The CPU runs the packed graph in fp32, with the feeds and run options that NVIDIA's provider gets."""
    stand_in = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    packed_onnx(rewrite(demo), "float32", stand_in / "onnx" / "model_bf16.onnx")
    reseal(stand_in)
    pairs = [("What is the red planet?", "Mars " * count) for count in (1, 5, 100, 40, 2)] * 10
    with load(demo_artifacts["onnx", "fp32"]) as other:
        expected = other.predict(pairs)
    with OpenArtifact(stand_in) as opened, OnCpu(opened, Settings("trt-rtx")) as runtime:
        np.testing.assert_allclose(runtime.predict(pairs), expected, atol=1e-4, rtol=1e-4)


def test_onnx_runtime_does_not_fall_back_by_itself(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Python interface retries a failed session on the CPU, and says so on stdout."""
    calls = []

    def failing(session: ort.InferenceSession, providers: Any, *rest: Any) -> None:
        calls.append(providers)
        raise RuntimeError("no engine")

    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", failing)
    with pytest.raises(ArtifactError, match="no engine"):
        load(demo_artifacts["onnx", "fp32"])
    assert calls == [["CPUExecutionProvider"]] and capsys.readouterr().out == ""
