"""One checkpoint in every setting that a GPU is measured in, and what each makes of the scores."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, ModernBertForSequenceClassification

from ettin.artifacts.metrics import score_error
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import Weights, read_weights
from ettin.export.targets.to_transformers import classification_tensors, write_configs
from ettin.graph.fold import inference_weights
from ettin.graph.torch_ops import PackedGraph
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines.flash import (
    FlashGraph,
    Kernel,
    attend_with,
    flash_logits,
    packed_inputs,
    use_flash,
    window_size,
)
from ettin.runtimes.tokenizer import PairTokenizer

Pairs = Sequence[tuple[str, str]]
_REFERENCE = "bf16 FA2 unpadded (the reference)"


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What `torch.nn.attention.varlen.varlen_attn` computes, one sequence at a time: for trials without a GPU."""
    parts = []
    for (q_start, q_end), (start, end) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert q_end - q_start <= max_q and end - start <= max_k  # noqa: S101 (the real kernel would read beyond)
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], k[start:end]) * scale
        if window_size != (-1, -1):
            key = torch.arange(end - start)
            query = torch.arange(q_end - q_start)[:, None] + (end - start) - (q_end - q_start)
            seen = (query - key <= window_size[0]) & (key - query <= window_size[1])
            scores = scores.masked_fill(~seen, float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(parts)


@dataclass
class Place:
    """Where everything runs.

    Args:
        device: "cuda" or "cpu".
        kernel: FlashAttention-2, or its stand-in.
    """

    device: str
    kernel: Kernel

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_mib(self) -> float | None:
        """Most device memory since the last call."""
        if self.device != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return round(peak)


@dataclass
class Subject:
    """One checkpoint, ready to be run in any setting.

    Args:
        checkpoint: its configs.
        weights: its tensors.
        configs: a folder with the configs of transformers' class.
        place: where it runs.
    """

    checkpoint: Checkpoint
    weights: Weights
    configs: Path
    place: Place

    def stock(self, dtype: torch.dtype, attention: str) -> Any:
        """Transformers' own class.

        Args:
            dtype: of everything.
            attention: "sdpa", "flash-padded" or "flash".
        """
        config = AutoConfig.from_pretrained(self.configs)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = ModernBertForSequenceClassification(config)
        tensors = classification_tensors(self.checkpoint, self.weights)
        model.load_state_dict(tensors, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are in no checkpoint
        model = model.to(self.place.device, dtype).eval()
        if attention == "flash":
            use_flash(model, self.place.kernel)
        if attention == "flash-padded":
            _use_padded_flash(model, self.place.kernel)
        return model

    def ours(self, dtype: torch.dtype = torch.bfloat16) -> FlashGraph:
        """Our graph on FlashAttention-2."""
        return FlashGraph(self._folded, self.checkpoint.shape, self.place.kernel, dtype).to(self.place.device)

    def packed(self, dtype: torch.dtype) -> PackedGraph:
        """The packed graph, what TensorRT engines are built from, run by torch operation by operation."""
        folded = {name: tensor.to(dtype) for name, tensor in self._folded.items()}
        return PackedGraph(folded, self.checkpoint.shape).to(self.place.device)

    @cached_property
    def _folded(self) -> dict[str, Tensor]:
        return inference_weights(self.weights.encoder, self.weights.head, self.checkpoint.shape)


def _use_padded_flash(model: Any, kernel: Kernel) -> None:
    """As transformers uses FlashAttention-2 on padded batches: linear layers see padding, attention does not."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float,
        sliding_window: int | None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        lengths = attention_mask.sum(-1, dtype=torch.int32)
        bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        real = attention_mask.flatten().nonzero()[:, 0]
        longest = int(lengths.max())
        q, k, v = (each.transpose(1, 2).flatten(0, 1)[real] for each in (query, key, value))
        window = window_size(sliding_window)
        mixed = kernel(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window)
        padded = torch.zeros_like(query.transpose(1, 2).flatten(0, 1)).index_copy_(0, real, mixed)
        return padded.unflatten(0, attention_mask.shape), None  # type: ignore[no-untyped-call]

    attend_with(model, "ettin_padded", attention, lambda *_, attention_mask=None, **__: attention_mask)


@contextmanager
def opened(checkpoint: Checkpoint, place: Place) -> Iterator[Subject]:
    """A checkpoint with its configs for transformers, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        write_configs(checkpoint, Path(folder))
        yield Subject(checkpoint, read_weights(checkpoint), Path(folder), place)


@torch.inference_mode()
def parity(subject: Subject, tokenizer: PairTokenizer, pairs: Pairs, max_length: int) -> dict[str, Any]:
    """Errors of every bf16 path against fp32 on the same device, in logits.

    The reference is FlashAttention-2 in bf16; a path of ours passes with a mean error of at most 1.5 times its own.
    """
    place = subject.place
    sequences = tokenizer.pairs(pairs, max_length)
    batches = [Batch.of(sequences[start : start + 32], 0) for start in range(0, len(sequences), 32)]

    def padded(model: Any) -> NDArray[np.float64]:
        found = []
        for batch in batches:
            ids, mask = (torch.from_numpy(each).to(place.device) for each in batch.padded())
            found.append(model(input_ids=ids, attention_mask=mask).logits[:, 0])
        return _joined(found)

    def flash(model: Any) -> NDArray[np.float64]:
        return _joined([flash_logits(model, batch, place.device) for batch in batches])

    def ours(graph: FlashGraph) -> NDArray[np.float64]:
        return _joined([graph(*packed_inputs(batch, place.device), batch.longest) for batch in batches])

    def packed(graph: PackedGraph) -> NDArray[np.float64]:
        found = []
        for batch in batches:
            feeds = {name: torch.from_numpy(each).to(place.device) for name, each in batch.packed().items()}
            found.append(graph(**feeds)[:, 0])
        return _joined(found)

    gold = padded(subject.stock(torch.float32, "sdpa"))
    scores = {
        "packed graph, fp32": packed(subject.packed(torch.float32)),
        "bf16 SDPA padded": padded(subject.stock(torch.bfloat16, "sdpa")),
        _REFERENCE: flash(subject.stock(torch.bfloat16, "flash")),
        "ours": ours(subject.ours()),
        "packed graph, bf16": packed(subject.packed(torch.bfloat16)),
    }
    errors = {name: score_error(each, gold) for name, each in scores.items()}
    baseline = errors[_REFERENCE].mean_abs
    return {
        "pairs": len(pairs),
        "gold_std": float(gold.std()),
        "cases": [
            {"ids": ids.tolist(), "fp32": fp32, "fa2": fa2}
            for ids, fp32, fa2 in zip(sequences, gold.tolist(), scores[_REFERENCE].tolist(), strict=True)
        ],
        "rows": {
            name: {**error.figures(), "of_reference": error.mean_abs / baseline} for name, error in errors.items()
        },
    }


def _joined(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.cat(list(parts)).double().cpu().numpy()
