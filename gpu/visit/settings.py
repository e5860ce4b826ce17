"""The settings that a visit measures: the release's four, and ours. One line adds a setting to parity and speed."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ettin.gpu.visit.models import (
    Pairs,
    Predict,
    TorchModel,
    opened_model,
    our_predict,
    our_score,
    packed_predict,
    stock_predict,
)

GOLD, REFERENCE, OURS = "fp32 SDPA", "bf16 FA2 unpadded", "ours"


@dataclass(frozen=True)
class Setting:
    """One way to score pairs.

    Args:
        ready: makes it ready.
        unit: what its batches are counted in, "pairs" or "tokens".
        first_batch: where the search for its best batch begins.
        part: the part of the visit that times it; None: it is compared, not timed.
        needs_gpu: it is left out where there is none.
    """

    ready: Callable[[TorchModel], Predict]
    unit: str = "tokens"
    first_batch: int = 16384
    part: str | None = "speed"
    needs_gpu: bool = False


def _ours(scorer: str, part: str = "speed", needs_gpu: bool = True) -> Setting:
    return Setting(partial(our_predict, ready=partial(our_score, scorer=scorer)), part=part, needs_gpu=needs_gpu)


def _stock(dtype: torch.dtype, attention: str) -> Setting:
    return Setting(partial(stock_predict, dtype=dtype, attention=attention), "pairs", 32)


# What is compared with fp32 and timed, by name. Those that take long to start have a part of their own.
SETTINGS: dict[str, Setting] = {
    GOLD: _stock(torch.float32, "sdpa"),
    REFERENCE: _stock(torch.bfloat16, "flash"),
    OURS: _ours("torch, eager", needs_gpu=False),
    "packed graph, fp32": Setting(partial(packed_predict, dtype=torch.float32), "pairs", 32, part=None),
    "packed graph, bf16": Setting(partial(packed_predict, dtype=torch.bfloat16), "pairs", 32, part=None),
    "bf16 SDPA": _stock(torch.bfloat16, "sdpa"),
    "bf16 FA2 padded": _stock(torch.bfloat16, "flash-padded"),
    "ours, CUDA graphs": _ours("torch, cuda-graphs"),
    "ours, Triton kernels": _ours("triton, eager"),
    "ours, Triton kernels, CUDA graphs": _ours("triton, cuda-graphs"),
    "ours, torch.compile": _ours("compiled, eager", part="compile"),
}


class TimedSetting:
    """A setting as a contestant, see `ettin.bench.contestants`.

    Args:
        path: folder of a checkpoint.
        name: of the setting.
        device: "cuda" or "cpu".
    """

    def __init__(self, path: str, name: str, device: str) -> None:
        setting = SETTINGS[name]
        self.batch_unit, self.first_batch = setting.unit, setting.first_batch
        with ExitStack() as stack:  # the weights are let go: a graph has its own
            self._predict = setting.ready(stack.enter_context(opened_model(Path(path), device)))
        self.description = f"torch {torch.__version__}, {device}, {name}"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> NDArray[np.float32]:
        """Scores [pairs]."""
        return self._predict(pairs, max_length, batch or self.first_batch)
