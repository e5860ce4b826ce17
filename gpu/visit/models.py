"""One checkpoint on one device, and every way to score pairs with it: the release's, and ours.

The release's settings run in a loop that does what sentence-transformers' `CrossEncoder.predict` does. With device
"cpu" a stand-in for the kernel goes through the same code, for rehearsals where there is no GPU.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, ModernBertForSequenceClassification, PreTrainedTokenizerFast

from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.weights import Weights, read_weights
from ettin.export.targets.to_transformers import classification_tensors, write_configs
from ettin.gpu.engines.flash import (
    Kernel,
    attend_with,
    flash_kernel,
    flash_logits,
    use_flash,
    window_size,
)
from ettin.gpu.engines.flash_scorer import SCORERS
from ettin.graph.fold import inference_weights
from ettin.graph.torch_ops import PackedGraph
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.request import Request
from ettin.runtimes.scheduler import Scheduler
from ettin.runtimes.tokenizer import PairTokenizer

Pairs = Sequence[tuple[str, str]]
# Takes pairs, tokens that they are truncated to, and a maximum batch; returns scores [pairs].
Predict = Callable[[Pairs, int, int], NDArray[np.float32]]
# Takes a batch, returns scores [pairs] as one of our engines does.
Score = Callable[[Batch], NDArray[np.float32]]


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What `torch.nn.attention.varlen.varlen_attn` computes, one sequence at a time: for rehearsals without a GPU."""
    parts = []
    for (q_start, q_end), (start, end) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert q_end - q_start <= max_q and end - start <= max_k  # noqa: S101 (the real kernel would read beyond)
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], k[start:end]) * scale
        if window_size != (-1, -1):
            key = torch.arange(end - start, device=q.device)
            query = torch.arange(q_end - q_start, device=q.device)[:, None] + (end - start) - (q_end - q_start)
            seen = (query - key <= window_size[0]) & (key - query <= window_size[1])
            scores = scores.masked_fill(~seen, float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(parts)


@dataclass
class TorchModel:
    """One checkpoint, which can be run in any setting."""

    checkpoint: Checkpoint
    weights: Weights
    tokenizer_file: Path
    configs: Path  # a folder with the configs of transformers' class
    device: str  # "cuda" or "cpu"
    kernel: Kernel  # FlashAttention-2, or its stand-in

    @cached_property
    def folded(self) -> dict[str, Tensor]:
        """The weights of our graphs."""
        return inference_weights(self.weights.encoder, self.weights.head, self.checkpoint.shape)


def kernel_on(device: str) -> Kernel:
    """FlashAttention-2, on a CPU its stand-in; a HardwareError if the GPU does not run it."""
    return flash_kernel() if device == "cuda" else plain_varlen


@contextmanager
def opened_model(folder: Path, device: str) -> Iterator[TorchModel]:
    """A checkpoint's folder on a device, "cuda" or "cpu"; a HardwareError if no GPU runs the kernel."""
    torch.backends.cuda.matmul.allow_tf32 = False
    kernel = kernel_on(device)
    checkpoint = read_checkpoint(folder)
    with tempfile.TemporaryDirectory() as configs:
        write_configs(checkpoint, Path(configs))
        yield TorchModel(checkpoint, read_weights(checkpoint), folder / "tokenizer.json", Path(configs), device, kernel)


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
        q, k, v = (heads.transpose(1, 2).flatten(0, 1)[real] for heads in (query, key, value))
        window = window_size(sliding_window)
        mixed = kernel(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window)
        padded = torch.zeros_like(query.transpose(1, 2).flatten(0, 1)).index_copy_(0, real, mixed)
        return padded.unflatten(0, attention_mask.shape), None  # type: ignore[no-untyped-call]

    attend_with(model, "ettin_padded", attention, lambda *_, attention_mask=None, **__: attention_mask)


def stock_predict(subject: TorchModel, *, dtype: torch.dtype, attention: str) -> Predict:
    """Transformers' own class in the loop of sentence-transformers 6.2: sort by characters, tokenise and score batches.

    The attention is "sdpa", "flash-padded" or "flash" (without padding).
    """
    config = AutoConfig.from_pretrained(subject.configs)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = ModernBertForSequenceClassification(config)
    model.load_state_dict(classification_tensors(subject.checkpoint, subject.weights), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are in no checkpoint
    model = model.to(subject.device, dtype).eval()
    if attention != "sdpa":
        (use_flash if attention == "flash" else _use_padded_flash)(model, subject.kernel)
    tokenizer, device = PreTrainedTokenizerFast(tokenizer_file=str(subject.tokenizer_file)), subject.device

    @torch.inference_mode()
    def predict(pairs: Pairs, max_length: int, batch: int) -> NDArray[np.float32]:
        order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
        parts = []
        for start in range(0, len(pairs), batch):
            texts = [list(pairs[index]) for index in order[start : start + batch]]
            rows = tokenizer(texts, truncation="longest_first", max_length=max_length)["input_ids"]
            ragged = Batch.of([np.array(ids, np.int32) for ids in rows], 0)
            if attention == "flash":
                parts.append(flash_logits(model, ragged, device))
            else:
                ids, mask = (torch.from_numpy(array).to(device) for array in ragged.padded())
                parts.append(model(input_ids=ids, attention_mask=mask).logits[:, 0])
        scores = np.empty(len(pairs), np.float32)
        scores[order] = torch.cat(parts).float().cpu().numpy()
        return scores

    return predict


def our_score(subject: TorchModel, scorer: str = "torch, eager") -> Score:
    """Our graph on FlashAttention-2 in bf16; `scorer` is a name in `SCORERS`."""
    return SCORERS[scorer](subject.folded, subject.checkpoint.shape, subject.kernel, device=subject.device)


def our_predict(subject: TorchModel, ready: Callable[[TorchModel], Score]) -> Predict:
    """One of our engines under the scheduler of every runtime; batches are counted in tokens."""
    score, tokenizer = ready(subject), PairTokenizer(subject.tokenizer_file)

    def predict(pairs: Pairs, max_length: int, tokens: int) -> NDArray[np.float32]:
        with closing(Scheduler(tokenizer, score, BatchLimits(2, tokens, in_parallel=False), 0)) as scheduler:
            return scheduler.scored(Request(pairs, max_length)).logits

    return predict


def packed_predict(subject: TorchModel, *, dtype: torch.dtype) -> Predict:
    """The packed graph, what TensorRT engines are built from, run by torch operation by operation."""
    weights = {name: tensor.to(dtype) for name, tensor in subject.folded.items()}
    graph = PackedGraph(weights, subject.checkpoint.shape).to(subject.device)
    tokenizer, device = PairTokenizer(subject.tokenizer_file), subject.device

    @torch.inference_mode()
    def predict(pairs: Pairs, max_length: int, batch: int) -> NDArray[np.float32]:
        sequences = tokenizer.pairs(pairs, max_length)
        parts = []
        for start in range(0, len(sequences), batch):
            feeds = Batch.of(sequences[start : start + batch], 0).packed()
            parts.append(graph(**{name: torch.from_numpy(array).to(device) for name, array in feeds.items()}))
        return np.asarray(torch.cat(parts)[:, 0].float().cpu().numpy())

    return predict
