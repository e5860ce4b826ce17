"""One contestant of a comparison, in a process of its own: loads, then times passes on request.

Reads one JSON object a line from stdin and answers with one: `{"do": "pass"}` scores all pairs, `{"do": "latency"}` one
query with its candidates, `{"do": "batch"}` changes what batches are cut by. The parent interleaves contestants, so all
see the same moods of the machine.

Stands alone: peers run it in environments where this project is not installed, so each kind imports what it needs.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Pairs = Sequence[tuple[str, str]]

_BATCHES = (4, 8, 16, 32)  # that a tuned peer chooses from


class Padding:
    """Counts tokens that an engine was given, and how many of them were real."""

    def __init__(self) -> None:
        self._batches: list[tuple[int, int]] = []

    def add(self, given: int, real: int) -> None:
        """A batch's tokens; from any thread."""
        self._batches.append((given, real))

    def share(self) -> float | None:
        """Of padding since the last call; None: nothing was counted."""
        batches, self._batches = self._batches, []
        return 1 - sum(real for _, real in batches) / sum(given for given, _ in batches) if batches else None


PADDING = Padding()


class Kind:
    """A contestant: something that scores, and can be told how large its batches are."""

    description: str

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        """Raw logits of the pairs; batch: see the kind; None: its own choice."""
        raise NotImplementedError


class Artifact(Kind):
    """One of ours. batch: token budget."""

    def __init__(self, path: str, settings: str) -> None:
        from ettin.runtimes import batch as batches

        self._path, self._settings = path, json.loads(settings)
        self._runtime: Any = None
        self._budget: int | None = None
        batches.Batch.padded = _counted(batches.Batch.padded)  # type: ignore[method-assign]
        batches.Batch.laid_out = _counted(batches.Batch.laid_out)  # type: ignore[method-assign]

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        if self._runtime is None or batch != self._budget:
            self._load(batch)
        return self._runtime.predict(pairs, max_length=max_length, activation_fn="identity")

    def _load(self, budget: int | None) -> None:
        from ettin.runtimes import load

        if self._runtime is not None:
            self._runtime.close()
        self._budget = budget
        self._runtime = load(self._path, batch_tokens=budget, **self._settings)
        self.description = f"{self._runtime.description}, {self._runtime.limits.concurrency} at a time"


class CrossEncoder(Kind):
    """sentence-transformers with an explicit dtype and attention. batch: pairs; its own is 32, or "best"."""

    def __init__(self, path: str, dtype: str, own: str = "32", device: str = "cpu") -> None:
        import sentence_transformers
        import torch

        # Not through this project's loader: this must run where only sentence-transformers is installed.
        self._model = sentence_transformers.CrossEncoder(
            path, device=device, model_kwargs={"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        )
        self._identity = torch.nn.Identity()
        self._model.register_forward_pre_hook(_count_mask, with_kwargs=True)
        self._own = None if own == "best" else int(own)
        versions = f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}"
        self.description = f"{versions}, {device}, {dtype}, SDPA, batch {own} unless told otherwise"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        self._model.max_seq_length = max_length
        texts = [list(pair) for pair in pairs]
        if self._own is None and batch is None and len(texts) > 1:
            self._own = _fastest(lambda size: self._scores(texts[:64], size))
        return self._scores(texts, batch or self._own or 1)

    def _scores(self, texts: list[list[str]], size: int) -> Any:
        return self._model.predict(texts, batch_size=size, activation_fn=self._identity, show_progress_bar=False)


def _counted(form: Callable[..., Any]) -> Any:
    def counted(batch: Any, multiple: int = 1) -> Any:
        ids, other = form(batch, multiple)
        PADDING.add(ids.size, len(batch.ids))
        return ids, other

    return counted


def _count_mask(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    mask = (arguments[0] if arguments else named)["attention_mask"]
    PADDING.add(mask.numel(), int(mask.sum()))


def _fastest(run: Callable[[int], Any]) -> int:
    """The batch size that takes the least time, best of two."""
    times: dict[int, float] = {}
    for size in _BATCHES * 2:
        start = time.perf_counter()
        run(size)
        times[size] = min(time.perf_counter() - start, times.get(size, float("inf")))
    return min(times, key=lambda size: times[size])


class Traced(Kind):
    """The checkpoint's own graph traced into OpenVINO as it is; see `traced_predict`."""

    def __init__(self, path: str, how: str) -> None:
        from ettin.bench.traced import traced_predict

        self._predict, self.description = traced_predict(Path(path), how)

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        return self._predict(pairs, max_length)


class Release(Kind):
    """One of the release's settings that sentence-transformers has no words for; see `gpu_speed`. batch: pairs."""

    def __init__(self, path: str, setting: str, max_length: str, device: str) -> None:
        from contextlib import ExitStack

        import torch

        from ettin.bench.gpu_speed import settings
        from ettin.bench.gpu_subject import Place, opened, plain_varlen
        from ettin.export.source.checkpoint import read_checkpoint
        from ettin.runtimes.engines.flash import flash_kernel

        place = Place(device, flash_kernel() if device == "cuda" else plain_varlen)
        self._open = ExitStack()  # until this process ends
        subject = self._open.enter_context(opened(read_checkpoint(Path(path)), place))
        ready, self._first = settings(subject, Path(path) / "tokenizer.json", int(max_length))[setting]
        self._predict = ready()
        self.description = f"torch {torch.__version__}, {device}, {setting}"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        return self._predict(pairs, batch or self._first)


class Optimum(Kind):
    """Optimum's ONNX Runtime model, padded batches of like lengths. batch: pairs."""

    def __init__(self, path: str, batch: str = "32") -> None:
        from importlib.metadata import version

        from optimum.onnxruntime import ORTModelForSequenceClassification
        from transformers import PreTrainedTokenizerFast

        self._model = ORTModelForSequenceClassification.from_pretrained(path)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        self._own = int(batch)
        self.description = f"Optimum {version('optimum')}, onnxruntime {version('onnxruntime')}, batch {batch}"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        size = batch or self._own
        order = sorted(range(len(pairs)), key=lambda at: len(pairs[at][0]) + len(pairs[at][1]))
        scores = [0.0] * len(pairs)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            inputs = self._tokenizer(
                [list(pairs[at]) for at in chosen], padding=True, truncation="longest_first", max_length=max_length,
                return_tensors="np",
            )  # fmt: skip
            mask = inputs["attention_mask"]
            PADDING.add(mask.size, int(mask.sum()))
            logits = self._model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
            for at, row in zip(chosen, logits, strict=True):
                scores[at] = float(row[0])
        return scores


class FastEmbed(Kind):
    """fastembed with a custom model in a folder. batch: pairs."""

    def __init__(self, path: str, model_file: str, batch: str = "64") -> None:
        import fastembed
        from fastembed.common.model_description import ModelSource
        from fastembed.rerank.cross_encoder import TextCrossEncoder

        TextCrossEncoder.add_custom_model(model="ettin", model_file=model_file, sources=ModelSource(hf="from/a-folder"))
        self._model = TextCrossEncoder("ettin", specific_model_path=path)
        self._own = int(batch)
        self.description = f"fastembed {fastembed.__version__}, batch {batch}"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        self._model.model.tokenizer.enable_truncation(max_length)
        return list(self._model.rerank_pairs(list(pairs), batch_size=batch or self._own))


class FlashRank(Kind):
    """FlashRank, given a folder's name as a model's."""

    def __init__(self, path: str) -> None:
        from flashrank import Ranker, RerankRequest

        folder = Path(path).resolve()
        self._model, self._request = Ranker(model_name=folder.name, cache_dir=str(folder.parent)), RerankRequest
        self.description = "FlashRank"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        requests = (self._request(query, [{"text": document}]) for query, document in pairs)
        return [self._model.rerank(request)[0]["score"] for request in requests]


class LlamaCpp(Kind):
    """llama.cpp with rank pooling, batches as large as its own default: it attends across all that is in one."""

    def __init__(self, path: str, batch_tokens: str = "512") -> None:
        import os

        import llama_cpp

        tokens, threads = int(batch_tokens), len(os.sched_getaffinity(0))
        self._model = llama_cpp.Llama(
            path, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_RANK, n_ctx=tokens, n_batch=tokens,
            n_ubatch=tokens, n_threads=threads, n_threads_batch=threads, verbose=False,
        )  # fmt: skip
        # Or the separator between query and document would not be read as the special token that it is.
        self._model.tokenize = partial(self._model.tokenize, special=True)
        self.description = f"llama-cpp-python {llama_cpp.__version__}, {Path(path).stem}, {tokens} tokens a batch"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        return [row[0] for row in self._model.embed([f"{query}[SEP]{document}" for query, document in pairs])]


KINDS: dict[str, Callable[..., Kind]] = {
    "artifact": Artifact,
    "cross-encoder": CrossEncoder,
    "traced": Traced,
    "release": Release,
    "optimum": Optimum,
    "fastembed": FastEmbed,
    "flashrank": FlashRank,
    "llama-cpp": LlamaCpp,
}


def main() -> None:
    """Serves until stdin ends."""
    order = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    contestant = KINDS[order["kind"]](*order["arguments"])
    pairs: Pairs = [tuple(pair) for pair in order["pairs"]]
    batch = order["batch"]
    contestant.predict(pairs[:1], order["max_length"], batch)
    _answer({"description": contestant.description, "load_s": time.perf_counter() - start})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "batch":
            batch = asked["batch"]
            continue
        chosen = pairs if asked["do"] == "pass" else _request(pairs, asked["request"], order["candidates"])
        PADDING.share()
        start = time.perf_counter()
        scores = contestant.predict(chosen, order["max_length"], batch)
        seconds = time.perf_counter() - start
        memory = {"peak_rss_mib": _peak_rss_mib(), "peak_gpu_mib": _peak_gpu_mib()}
        scores = [float(score) for score in scores]
        _answer({"seconds": seconds, **memory, "padding_share": PADDING.share(), "scores": scores})


def _request(pairs: Pairs, number: int, candidates: int) -> Pairs:
    """The documents from `number` · `candidates` on, round and round, with the query of the first."""
    chosen = [pairs[(number * candidates + at) % len(pairs)] for at in range(candidates)]
    return [(chosen[0][0], document) for _, document in chosen]


def _peak_rss_mib() -> float:
    """Of this program alone: `getrusage` would begin with what the parent had when it started this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _peak_gpu_mib() -> float | None:
    """What torch took of the GPU; None: it was not used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_allocated()) / 2**20


def _answer(values: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps({"contestant": values}) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
