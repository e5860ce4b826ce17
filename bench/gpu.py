"""What is measured on a GPU: parity with FlashAttention-2 and fp32, golden scores, and speed of every released size.

Speed is a contest of the release's settings and ours, each at its best batch, on pairs at their natural lengths. The
release's settings are run by a loop that does what sentence-transformers' `CrossEncoder.predict` does. With device
"cpu" a stand-in for the kernel goes through the same code, for trials where there is no GPU.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, ModernBertForSequenceClassification, PreTrainedTokenizerFast

from ettin.artifacts.metrics import score_error
from ettin.bench.contest import Contest, Contestant, figures
from ettin.bench.peaks import pair_flops
from ettin.bench.speed import pairs_for
from ettin.bench.workloads import pairs_to_score
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import SIZES
from ettin.export.source.weights import Weights, read_weights, write_random_checkpoint
from ettin.export.targets.to_transformers import classification_tensors, write_configs
from ettin.gpu.engines.flash import (
    FlashGraph,
    Kernel,
    attend_with,
    flash_kernel,
    flash_logits,
    packed_inputs,
    use_flash,
    window_size,
)
from ettin.graph.fold import inference_weights
from ettin.graph.torch_ops import PackedGraph
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.request import Request
from ettin.runtimes.scheduler import Scheduler
from ettin.runtimes.tokenizer import PairTokenizer

Pairs = Sequence[tuple[str, str]]
# Takes pairs, tokens that they are truncated to, and a maximum batch; returns scores.
Predict = Callable[[Pairs, int, int], NDArray[np.float32]]

MAX_LENGTH = 512
_GOLD, _REFERENCE, _COMPILED = "fp32 SDPA", "bf16 FA2 unpadded", "ours, torch.compile"
_TINY = replace(
    SIZES["17m"].shape, hidden_size=64, intermediate_size=96, num_heads=2, global_layers=(True, False, False, True)
)


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


@contextmanager
def opened_model(folder: Path, device: str) -> Iterator[TorchModel]:
    """A checkpoint's folder on a device, "cuda" or "cpu"; a HardwareError if no GPU runs the kernel."""
    torch.backends.cuda.matmul.allow_tf32 = False
    kernel = flash_kernel() if device == "cuda" else plain_varlen
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
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(subject.tokenizer_file))

    @torch.inference_mode()
    def predict(pairs: Pairs, max_length: int, batch: int) -> NDArray[np.float32]:
        order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
        parts = []
        for start in range(0, len(pairs), batch):
            texts = [list(pairs[index]) for index in order[start : start + batch]]
            rows = tokenizer(texts, truncation="longest_first", max_length=max_length)["input_ids"]
            ragged = Batch.of([np.array(ids, np.int32) for ids in rows], 0)
            if attention == "flash":
                parts.append(flash_logits(model, ragged, subject.device))
            else:
                ids, mask = (torch.from_numpy(array).to(subject.device) for array in ragged.padded())
                parts.append(model(input_ids=ids, attention_mask=mask).logits[:, 0])
        scores = np.empty(len(pairs), np.float32)
        scores[order] = torch.cat(parts).float().cpu().numpy()
        return scores

    return predict


def our_predict(subject: TorchModel, *, compiled: bool) -> Predict:
    """Our graph on FlashAttention-2 in bf16, under the scheduler of every runtime."""
    graph = FlashGraph(subject.folded, subject.checkpoint.shape, subject.kernel, torch.bfloat16).to(subject.device)
    run = torch.compile(graph, dynamic=True) if compiled else graph
    tokenizer = PairTokenizer(subject.tokenizer_file)

    @torch.inference_mode()
    def score(batch: Batch) -> NDArray[np.float32]:
        return np.asarray(run(*packed_inputs(batch, subject.device), batch.longest).float().cpu().numpy())

    def predict(pairs: Pairs, max_length: int, tokens: int) -> NDArray[np.float32]:
        with closing(Scheduler(tokenizer, score, BatchLimits(2, tokens, in_parallel=False), 0)) as scheduler:
            return scheduler.scored(Request(pairs, max_length)).logits

    return predict


def packed_predict(subject: TorchModel, *, dtype: torch.dtype) -> Predict:
    """The packed graph, what TensorRT engines are built from, run by torch operation by operation."""
    weights = {name: tensor.to(dtype) for name, tensor in subject.folded.items()}
    graph = PackedGraph(weights, subject.checkpoint.shape).to(subject.device)
    tokenizer = PairTokenizer(subject.tokenizer_file)

    @torch.inference_mode()
    def predict(pairs: Pairs, max_length: int, batch: int) -> NDArray[np.float32]:
        sequences = tokenizer.pairs(pairs, max_length)
        parts = []
        for start in range(0, len(sequences), batch):
            feeds = Batch.of(sequences[start : start + batch], 0).packed()
            parts.append(graph(**{name: torch.from_numpy(array).to(subject.device) for name, array in feeds.items()}))
        return np.asarray(torch.cat(parts)[:, 0].float().cpu().numpy())

    return predict


# By name: what batches are counted in, where the search for the best one begins, and what makes a setting ready.
SETTINGS: dict[str, tuple[str, int, Callable[[TorchModel], Predict]]] = {
    _GOLD: ("pairs", 8, partial(stock_predict, dtype=torch.float32, attention="sdpa")),
    "bf16 SDPA": ("pairs", 8, partial(stock_predict, dtype=torch.bfloat16, attention="sdpa")),
    "bf16 FA2 padded": ("pairs", 8, partial(stock_predict, dtype=torch.bfloat16, attention="flash-padded")),
    _REFERENCE: ("pairs", 8, partial(stock_predict, dtype=torch.bfloat16, attention="flash")),
    "ours": ("tokens", 4096, partial(our_predict, compiled=False)),
    _COMPILED: ("tokens", 4096, partial(our_predict, compiled=True)),
}


def parity(model: TorchModel, pairs: Pairs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors of every setting, and of the packed graph, against fp32 on the same device, in logits.

    The reference is FlashAttention-2 in bf16; a path of ours passes with a mean error of at most 1.5 times its own.
    Returns the figures, and a golden: token ids of the pairs with their scores in fp32 and by the reference.
    """
    ready = {name: (ready, 32 if unit == "pairs" else 8192) for name, (unit, _, ready) in SETTINGS.items()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ready[f"packed graph, {name}"] = partial(packed_predict, dtype=dtype), 32
    del ready[_COMPILED]
    scores = {name: prepare(model)(pairs, MAX_LENGTH, batch) for name, (prepare, batch) in ready.items()}
    gold = scores.pop(_GOLD)
    errors = {name: score_error(values, gold) for name, values in scores.items()}
    own = errors[_REFERENCE].mean_abs
    rows = {name: {**error.figures(), "of_reference": error.mean_abs / own} for name, error in errors.items()}
    sequences = PairTokenizer(model.tokenizer_file).pairs(pairs, MAX_LENGTH)
    cases = [
        {"ids": ids.tolist(), "fp32": fp32, "fa2": fa2}
        for ids, fp32, fa2 in zip(sequences, gold.tolist(), scores[_REFERENCE].tolist(), strict=True)
    ]
    weights = {"weights": model.checkpoint.name, "weights_sha256": model.checkpoint.weights_sha256()}
    figures = {**weights, "pairs": len(pairs), "gold_std": float(gold.std()), "rows": rows}
    return figures, {**weights, "cases": cases}


def size_speeds(
    size: str, device: str, data: Path | None, tokenizer: Path, minutes: float, peaks: dict[str, float]
) -> dict[str, Any]:
    """A contest of all settings on one size, released or "tiny", with random weights.

    The search for the best batches takes so many minutes; data: see `pairs_to_score`; peaks: see `gpu_peaks`.
    """
    shape = _TINY if size == "tiny" else SIZES[size].shape
    pairs = pairs_to_score(data, pairs_for(shape, device) if device == "cuda" else 8)
    with tempfile.TemporaryDirectory() as scratch:
        write_random_checkpoint(Path(scratch), shape, 0, tokenizer)
        names = [name for name in SETTINGS if device == "cuda" or name != _COMPILED]
        entries = [Contestant(name, "torch", [scratch, name, device], searches=True) for name in names]
        end = time.monotonic() + 60 * minutes
        candidates = min(100, len(pairs))
        Contest(pairs, candidates, MAX_LENGTH, 3, search_until=end, together=True).run(entries)
        lengths = [len(ids) for ids in PairTokenizer(Path(scratch) / "tokenizer.json").pairs(pairs, MAX_LENGTH)]
    baseline = next(entry for entry in entries if entry.name == _REFERENCE)
    rows = [figures(entry, len(pairs), entries[0], baseline) for entry in entries]
    flops = sum(pair_flops(shape, length) for length in lengths) / len(pairs)
    for row in rows:
        peak = peaks.get("fp32" if row["name"].startswith("fp32") else "bf16")
        row["share_of_peak"] = row["pairs_per_s"] * flops / peak / 1e9 if peak and "pairs_per_s" in row else None
    common = {"weights": "random", "pairs": len(pairs), "candidates": candidates}
    return {**common, "tokens_per_pair": sum(lengths) / len(pairs), "contestants": rows}
