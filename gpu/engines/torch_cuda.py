"""Runs `transformers` artifacts with torch on a GPU.

In fp32: transformers' own model, padded, with SDPA attention, as on a CPU. In bf16: our graph without padding, with
FlashAttention-2.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.gpu.engines.flash import flash_kernel
from ettin.gpu.engines.flash_scorer import FlashScorer
from ettin.graph import ModelShape
from ettin.graph.fold import inference_weights, modular_tensors
from ettin.runtimes.base import Settings
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.engines.on_torch import DTYPES, TorchRuntime


class CudaTorchRuntime(TorchRuntime):
    """The stock transformers model, or our graph of it; see `Runtime`.

    Args:
        artifact: open.
        settings: those of `TorchRuntime`.

    Raises:
        HardwareError: no CUDA device, or for bf16 none that FlashAttention-2 runs on.
    """

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        if not torch.cuda.is_available():
            raise HardwareError("device 'cuda': torch finds no CUDA device. Run: ettin-export --doctor")
        self._kernel = flash_kernel() if artifact.manifest.precision == "bf16" else None
        super().__init__(artifact, settings)

    def prepared(self, model: Any, manifest: Manifest) -> Any:
        if self._kernel is None:
            return model.to("cuda").eval()
        shape = ModelShape.from_json(manifest.source.shape)
        tensors = {name: tensor.float() for name, tensor in model.state_dict().items()}
        weights = inference_weights(*modular_tensors(tensors), shape)
        return FlashScorer(weights, shape, self._kernel, dtype=DTYPES[manifest.precision])

    @property
    def batch_limits(self) -> BatchLimits:
        # While the GPU computes one batch, the next is copied and its kernels are queued.
        return BatchLimits(concurrency=2, batch_tokens=65536, in_parallel=False)

    @property
    def description(self) -> str:
        attention = "FlashAttention-2, unpadded" if self._kernel is not None else "SDPA"
        return f"torch {torch.__version__}, cuda, {attention}, {self.manifest.precision}"

    def score(self, batch: Batch) -> NDArray[np.float32]:
        if self._kernel is None:
            return super().score(batch)
        scores: NDArray[np.float32] = self._model(batch)
        return scores
