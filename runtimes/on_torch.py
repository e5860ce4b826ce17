"""Runs `transformers` artifacts with torch: transformers' own ModernBertForSequenceClassification."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes.base import Limits, Runtime, Settings
from ettin.runtimes.batch import Batch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Small batches stay in the caches. Measured with the 17m shape in fp32 on two cores, SQuAD pairs: 126 pairs/s with
# 512 tokens a thread, 94 with 4096.
_CPU_TOKENS_PER_THREAD = 512


class TorchRuntime(Runtime):
    """The stock transformers model with SDPA attention; see `Runtime`.

    Args:
        folder: the artifact.
        manifest: its manifest.
        settings: no streams, no cache; `threads` are torch's for the whole process, None: torch's own choice.

    Raises:
        HardwareError: no CUDA device.
    """

    def __init__(self, folder: Path, manifest: Manifest, settings: Settings) -> None:
        device = settings.device
        settings.refuse("transformers", "streams", "cache_dir")
        if device == "cuda" and not torch.cuda.is_available():
            raise HardwareError("device 'cuda': torch finds no CUDA device. Run: ettin-export --doctor")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        # The dtype is explicit: transformers 5 would otherwise take the stored one.
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=_DTYPES[manifest.precision], attn_implementation="sdpa", local_files_only=True
        )
        self._model.to(device).eval()
        self._device = device
        tokens = _CPU_TOKENS_PER_THREAD * torch.get_num_threads() if device == "cpu" else 65536
        super().__init__(folder, manifest, settings, Limits(concurrency=1, batch_tokens=tokens))

    @property
    def description(self) -> str:
        return f"torch {torch.__version__}, {self._device}, SDPA, {self.manifest.precision}"

    @property
    def arithmetic(self) -> str:
        return {"fp32": "f32", "bf16": "bf16"}[self.manifest.precision]

    @torch.inference_mode()
    def score(self, batch: Batch) -> NDArray[np.float32]:
        input_ids, attention_mask = (torch.from_numpy(each).to(self._device) for each in batch.padded())
        logits = self._model(input_ids=input_ids, attention_mask=attention_mask).logits
        return np.asarray(logits[:, 0].float().cpu().numpy())

    def _release(self) -> None:
        del self._model
