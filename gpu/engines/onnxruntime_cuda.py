"""Runs `onnx` artifacts with ONNX Runtime on a GPU."""

import onnxruntime as ort

from ettin.runtimes.base import Settings
from ettin.runtimes.batch import BatchLimits
from ettin.runtimes.engines.on_onnxruntime import OnnxRuntime
from ettin.runtimes.machine import CpuPlan


class CudaOnnxRuntime(OnnxRuntime):
    """ONNX Runtime's CUDA provider; see `OnnxRuntime`.

    Args:
        artifact: open.
        settings: no threads, no streams, no cache.
    """

    provider = "CUDAExecutionProvider"
    memory = "cuda"
    refused: tuple[str, ...] = ("cache_dir", "streams", "threads")
    fix = 'pip uninstall -y onnxruntime && pip install "ettin-export[onnx-gpu]"'

    def plan(self, settings: Settings) -> CpuPlan:
        return CpuPlan(streams=1, threads_per_stream=1)

    def batch_limits(self, plan: CpuPlan) -> BatchLimits:
        return BatchLimits(concurrency=1, batch_tokens=65536)

    def run_options(self) -> ort.RunOptions:
        return ort.RunOptions()
