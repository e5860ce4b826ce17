"""Pairs a second on a GPU: the release's settings and ours, each at its best batch size."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from ettin.bench.gpu_subject import Pairs, Place, Subject
from ettin.graph import ModelShape
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.engines.flash import flash_logits, packed_inputs
from ettin.runtimes.scheduler import Scheduler
from ettin.runtimes.tokenizer import PairTokenizer

MAX_LENGTH = 512
PASSES = 3

# Takes pairs and a batch size, returns scores.
Predict = Callable[[Pairs, int], NDArray[np.float32]]


@torch.inference_mode()
def stock_loop(
    model: Any,
    tokenizer: Any,
    place: Place,
    pairs: Pairs,
    batch_size: int,
    unpadded: bool,
    max_length: int = MAX_LENGTH,
) -> Any:
    """What sentence-transformers 6.2 does in `predict`: sort by characters, tokenise and score batch after batch."""
    order = sorted(range(len(pairs)), key=lambda at: -len(pairs[at][0]) - len(pairs[at][1]))
    scores = []
    for start in range(0, len(pairs), batch_size):
        chosen = [list(pairs[at]) for at in order[start : start + batch_size]]
        features = tokenizer(
            chosen, padding=not unpadded, truncation="longest_first", max_length=max_length,
            return_tensors=None if unpadded else "pt",
        )  # fmt: skip
        if unpadded:
            batch = Batch.of([np.array(ids, np.int32) for ids in features["input_ids"]], 0)
            scores.append(flash_logits(model, batch, place.device))
        else:
            inputs = {name: features[name].to(place.device) for name in ("input_ids", "attention_mask")}
            scores.append(model(**inputs).logits[:, 0])
    found = np.empty(len(pairs), np.float32)
    found[order] = torch.cat(scores).float().cpu().numpy()
    return found


def settings(
    subject: Subject, tokenizer_file: Path, max_length: int = MAX_LENGTH
) -> dict[str, tuple[Callable[[], Predict], int]]:
    """By name: what makes a setting ready, and its first batch size (pairs; for ours, tokens)."""
    place = subject.place
    stock_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token="[PAD]")  # noqa: S106

    def stock(dtype: torch.dtype, attention: str) -> Callable[[], Predict]:
        def ready() -> Predict:
            model = subject.stock(dtype, attention)
            unpadded = attention == "flash"
            return lambda pairs, size: stock_loop(model, stock_tokenizer, place, pairs, size, unpadded, max_length)

        return ready

    def ours(compiled: bool) -> Callable[[], Predict]:
        def ready() -> Predict:
            graph = subject.ours()
            run = torch.compile(graph, dynamic=True) if compiled else graph
            tokenizer = PairTokenizer(tokenizer_file)

            @torch.inference_mode()
            def score(batch: Batch) -> NDArray[np.float32]:
                return np.asarray(run(*packed_inputs(batch, place.device), batch.longest).float().cpu().numpy())

            def predict(pairs: Pairs, tokens: int) -> NDArray[np.float32]:
                scheduler = Scheduler(tokenizer, score, BatchLimits(2, tokens, in_parallel=False), 0)
                try:
                    return scheduler.logits(pairs, max_length)
                finally:
                    scheduler.close()

            return predict

        return ready

    found = {
        "fp32 SDPA": (stock(torch.float32, "sdpa"), 8),
        "bf16 SDPA": (stock(torch.bfloat16, "sdpa"), 8),
        "bf16 FA2 padded": (stock(torch.bfloat16, "flash-padded"), 8),
        "bf16 FA2 unpadded": (stock(torch.bfloat16, "flash"), 8),
        "ours": (ours(False), 4096),
    }
    if place.device == "cuda":
        found["ours, torch.compile"] = (ours(True), 4096)
    return found


def best_of(predict: Predict, first: int, pairs: Pairs, place: Place, deadline: float) -> dict[str, Any]:
    """The best batch size's median of three passes.

    Args:
        predict: the setting.
        first: smallest batch size.
        pairs: repeated or cut, so that a pass takes about a second.
        place: where it runs.
        deadline: `time.monotonic()` at which to stop probing.
    """

    def seconds(count: int, size: int) -> float:
        chosen = (list(pairs) * (-(-count // len(pairs))))[:count]
        place.wait()
        start = time.perf_counter()
        predict(chosen, size)
        place.wait()
        return time.perf_counter() - start

    predict(pairs[:64], first)  # kernels are loaded or compiled, memory is reserved
    rate = 64 / seconds(64, first)
    probed: dict[int, float] = {}
    size, worse, stopped = first, 0, "no gain twice"
    while worse < 2:
        if probed and time.monotonic() > deadline:
            stopped = "out of time"
            break
        count = int(np.clip(rate, 128, 16384))
        try:
            found = count / seconds(count, size)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            stopped = "out of memory"
            break
        worse = 0 if found > 1.02 * max(probed.values(), default=0.0) else worse + 1
        probed[size], rate = found, max(rate, found)
        size *= 2
    if not probed:
        return {"stopped": stopped}
    best = max(probed, key=lambda each: probed[each])
    count = int(np.clip(rate, 128, 16384))
    place.peak_mib()
    passes = [count / seconds(count, best) for _ in range(PASSES)]
    return {
        "batch": best,
        "pairs_per_s": statistics.median(passes),
        "passes": passes,
        "pairs": count,
        "peak_gpu_mib": place.peak_mib(),
        "stopped": stopped,
        "probed": probed,
    }


def matrix_peak_tflops(place: Place) -> float | None:
    """Fastest bf16 product of large matrices on this card."""
    if place.device != "cuda":
        return None
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        place.wait()
        start = time.perf_counter()
        torch.matmul(a, b)
        place.wait()
        best = min(best, time.perf_counter() - start)
    return 2 * 8192**3 / best / 1e12


def linear_flops_per_token(shape: ModelShape) -> float:
    """Multiplications and additions of the encoder's linear layers as the checkpoint has them, without attention."""
    return 2.0 * shape.num_layers * (4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size)
