"""Runs `transformers` artifacts with torch.

In fp32, and on CPUs: transformers' own ModernBertForSequenceClassification, padded, with SDPA attention. In bf16 on a
GPU: our graph without padding, with FlashAttention-2.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.flash import flash_kernel, packed_inputs
from ettin.runtimes.graph import ModelShape
from ettin.runtimes.graph.flash_graph import FlashGraph, Kernel, modular_tensors
from ettin.runtimes.graph.fold import inference_weights

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Small batches stay in the caches. Measured with the 17m shape in fp32 on two cores, SQuAD pairs: 126 pairs/s with
# 512 tokens a thread, 94 with 4096.
_CPU_TOKENS_PER_THREAD = 512


class TorchRuntime(Runtime):
    """The stock transformers model, or our graph of it; see `Runtime`.

    Args:
        folder: the artifact.
        manifest: its manifest.
        settings: no streams, no cache; `threads` are torch's for the whole process, None: torch's own choice.

    Raises:
        HardwareError: no CUDA device, or for bf16 none that FlashAttention-2 runs on.
    """

    def __init__(self, folder: Path, manifest: Manifest, settings: Settings) -> None:
        device = settings.device
        settings.refuse("transformers", "streams", "cache_dir")
        if device == "cuda" and not torch.cuda.is_available():
            raise HardwareError("device 'cuda': torch finds no CUDA device. Run: ettin-export --doctor")
        kernel = flash_kernel() if device == "cuda" and manifest.precision == "bf16" else None
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        # The dtype is explicit: transformers 5 would otherwise take the stored one.
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=_DTYPES[manifest.precision], attn_implementation="sdpa", local_files_only=True
        )
        self._device = device
        self._flash = None if kernel is None else self._flash_graph(manifest, kernel)
        if self._flash is None:
            self._model.to(device).eval()
        if device == "cpu":
            limits = BatchLimits(concurrency=1, batch_tokens=_CPU_TOKENS_PER_THREAD * torch.get_num_threads())
        else:  # while the GPU computes one batch, the next is copied and its kernels are queued
            limits = BatchLimits(concurrency=2, batch_tokens=65536, in_parallel=False)
        super().__init__(folder, manifest, settings, limits)

    def _flash_graph(self, manifest: Manifest, kernel: Kernel) -> FlashGraph:
        shape = ModelShape.from_json(manifest.source.shape)
        tensors = {name: tensor.float() for name, tensor in self._model.state_dict().items()}
        weights = inference_weights(*modular_tensors(tensors), shape)
        self._model = None
        return FlashGraph(weights, shape, kernel, _DTYPES[manifest.precision]).to(self._device)

    @property
    def description(self) -> str:
        attention = "FlashAttention-2, unpadded" if self._flash else "SDPA"
        return f"torch {torch.__version__}, {self._device}, {attention}, {self.manifest.precision}"

    @property
    def arithmetic(self) -> str:
        return {"fp32": "f32", "bf16": "bf16"}[self.manifest.precision]

    @torch.inference_mode()
    def score(self, batch: Batch) -> NDArray[np.float32]:
        if self._flash is not None:
            logits = self._flash(*packed_inputs(batch, self._device), batch.longest)
        else:
            input_ids, attention_mask = (torch.from_numpy(each).to(self._device) for each in batch.padded())
            logits = self._model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
        return np.asarray(logits.float().cpu().numpy())

    def _release(self) -> None:
        self._model = self._flash = None
