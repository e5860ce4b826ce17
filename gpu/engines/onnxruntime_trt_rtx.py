"""Runs packed `onnx` artifacts with NVIDIA's TensorRT-RTX provider, a plug-in of ONNX Runtime that PyPI has whole.

ONNX Runtime hands the graph to TensorRT-RTX, which builds an engine of it when the artifact is loaded. The provider
(0.5.0) was tried without a GPU, with stand-ins of the driver and the CUDA runtime that report an RTX 3090: it takes the
whole graph with the options below as one node, and compiles it for sm_86. Nothing was executed.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ettin.artifacts.errors import EttinError, HardwareError, UsageError
from ettin.artifacts.opened import OpenArtifact
from ettin.gpu.engines.onnxruntime_cuda import CudaOnnxRuntime
from ettin.gpu.engines.profiles import BATCH_PAIRS, BATCH_TOKENS, LONGEST_MULTIPLE, Profile, Profiles, profiles
from ettin.runtimes.base import Settings
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.machine import CpuPlan, gpus

_DRIVER = "an NVIDIA driver for CUDA 13 (580 or later)"


class TrtRtxOnnxRuntime(CudaOnnxRuntime):
    """ONNX Runtime's TensorRT-RTX provider; see `CudaOnnxRuntime`.

    Args:
        artifact: open; its graph is packed (precision "bf16").
        settings: no threads, no streams; in `cache_dir`, TensorRT-RTX keeps the kernels that it compiles for this GPU.

    Raises:
        HardwareError: no driver, no GPU that TensorRT-RTX runs on, or it can't build the engine.
        UsageError: the artifact is padded, or more tokens in a batch than the engine is built for.
    """

    provider = "NvTensorRTRTXExecutionProvider"
    refused = ("streams", "threads")

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        manifest = artifact.manifest
        if [tensor.name for tensor in manifest.interface.inputs] != ["input_ids", "cu_seqlens", "longest"]:
            raise UsageError(
                f"device '{settings.device}' runs packed graphs, {artifact.path} is padded {manifest.precision}. "
                "Export: --target onnx --precision bf16"
            )
        if settings.batch_tokens is not None and settings.batch_tokens > BATCH_TOKENS:
            raise UsageError(f"batch_tokens is {settings.batch_tokens}, the engine is built for at most {BATCH_TOKENS}")
        self._profiles = Profiles(profiles(manifest.max_length_tokens), manifest.tokenizer.pad_token_id)
        self._architecture = ""
        try:
            super().__init__(artifact, settings)
        except EttinError:
            raise
        except Exception as error:  # of ONNX Runtime, whose classes are not public
            raise HardwareError(
                f"device '{settings.device}': TensorRT-RTX can't build its engine of {artifact.path} ({error}). Run: "
                "ettin-export --doctor"
            ) from error

    def batch_limits(self, plan: CpuPlan) -> BatchLimits:
        return BatchLimits(
            concurrency=1, batch_tokens=BATCH_TOKENS, length_multiple=LONGEST_MULTIPLE, batch_pairs=BATCH_PAIRS
        )

    def providers(self, options: ort.SessionOptions, settings: Settings) -> None:
        """Gives the session the first GPU, and no CPU for what that can't run."""
        device = _devices(settings.device)[0]
        self._architecture = device.ep_metadata.get("target_architecture", "unknown architecture")
        # TensorRT-RTX gets the graph as it was exported and proven; it optimises by itself.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([device], provider_options(self._profiles.profiles, settings.cache_dir))

    @property
    def description(self) -> str:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin

        product = f"TensorRT-RTX provider {plugin.__version__}"
        return f"ONNX Runtime {ort.__version__}, {product}, {self._architecture}, {self.manifest.precision}"

    def score(self, batch: Batch) -> NDArray[np.float32]:
        assert self._session is not None  # noqa: S101 (predict refuses a closed runtime)
        shape = self._profiles.shape(batch)
        feeds = {name: np.zeros(count, np.int64) for name, count in shape.inputs.items()}
        self._profiles.fill(batch, shape, feeds["input_ids"], feeds["cu_seqlens"])
        options = self.run_options()
        options.add_run_config_entry("nv_profile_index", str(shape.profile))
        (logits,) = self._session.run(["logits"], feeds, options)
        return np.asarray(logits[: len(batch), 0], np.float32)


def provider_options(shapes: Sequence[Profile], cache_dir: Path | None) -> dict[str, str]:
    """What the provider is told. Source of the names: `tensorrt_rtx_provider_options.h` in its package.

    Args:
        shapes: the optimisation profiles.
        cache_dir: folder of compiled kernels; None: none are kept.

    CUDA graphs stay off (`enable_cuda_graph`): the provider wants the same shapes in all runs.
    """
    options = {"nv_multi_profile_enable": "1"}
    for kind in ("min", "opt", "max"):
        # All profiles one after the other; the provider counts how often it reads the name of an input.
        inputs = ((name, getattr(ranges, kind)) for shape in shapes for name, ranges in shape.items())
        options[f"nv_profile_{kind}_shapes"] = ",".join(f"{name}:{'x'.join(map(str, dims))}" for name, dims in inputs)
    if cache_dir is not None:
        options["nv_runtime_cache_path"] = str(cache_dir)
    return options


def _devices(device: str) -> list[Any]:
    """The GPUs that the provider offers; raises `HardwareError` if there are none."""
    try:
        _register()
    except Exception as error:  # of ONNX Runtime, whose classes are not public
        reason = str(error).rpartition("with error: ")[2]
        raise HardwareError(
            f"device '{device}': ONNX Runtime can't load NVIDIA's TensorRT-RTX provider ({reason}). It needs "
            f"{_DRIVER}. Run: nvidia-smi"
        ) from error
    present = [offer for offer in ort.get_ep_devices() if offer.ep_name == TrtRtxOnnxRuntime.provider]
    if not present:
        here = ", ".join(f"{gpu.name} ({gpu.arch})" for gpu in gpus()) or "none"
        raise HardwareError(
            f"device '{device}': TensorRT-RTX found no GPU that it runs on (sm_86, sm_89, sm_120 or later) with "
            f"{_DRIVER}; GPUs here: {here}. Run: nvidia-smi"
        )
    return present


@functools.cache
def _register() -> None:
    """Makes the provider known to ONNX Runtime, once in a process."""
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    # Its package (0.5.0) carries the CUDA runtime, but neither loads it nor names its folder, and so fails on a machine
    # without a CUDA toolkit: "libcudart.so.13: cannot open shared object file".
    library = Path(plugin.get_library_path())
    for runtime in sorted(library.parent.glob("libcudart.so.*")):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    ort.register_execution_provider_library(plugin.get_ep_name(), str(library))
