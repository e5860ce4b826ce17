"""Runs `transformers` artifacts with torch: transformers' own ModernBertForSequenceClassification."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes.base import Limits, Runtime
from ettin.runtimes.batch import Batch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchRuntime(Runtime):
    """The stock transformers model with SDPA attention; see `Runtime`.

    Args:
        folder: the artifact.
        manifest: its manifest.
        device: "cpu" or "cuda".
        threads: torch's CPU threads, for the whole process; None: torch's own choice.
        max_length: see `Runtime`.

    Raises:
        HardwareError: no CUDA device.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, device: str, threads: int | None, max_length: int | None
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise HardwareError("device 'cuda': torch finds no CUDA device. Run: ettin-export --doctor")
        if threads is not None:
            torch.set_num_threads(threads)
        # The dtype is explicit: transformers 5 would otherwise take the stored one.
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=_DTYPES[manifest.precision], attn_implementation="sdpa", local_files_only=True
        )
        self._model.to(device).eval()
        self._device = device
        super().__init__(
            folder, manifest, Limits(concurrency=1, batch_tokens=8192 if device == "cpu" else 65536), max_length
        )

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
