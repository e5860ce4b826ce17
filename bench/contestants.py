"""What takes part in a contest: our artifacts and other programs, each in a process of its own that runs this file.

Reads one JSON object a line from stdin. The first one says what to load, and is answered when a first pair was scored.
`{"do": "pass"}` then scores all pairs, `{"do": "latency", "request": 0}` one query with its candidates, each answered
with seconds and scores; `{"do": "batch", "batch": 8}` changes the maximum batch and has no answer. This file stands
alone: it also runs where this project is not installed, so each class imports what it needs.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

Pairs = Sequence[tuple[str, str]]
_PACKAGES = ("ettin-export", "fastembed", "llama-cpp-python", "nncf", "onnxruntime", "openvino", "optimum",
             "sentence-transformers", "torch", "transformers")  # fmt: skip
_BATCHES: list[tuple[int, int]] = []  # tokens that an engine was given, and how many were real; filled by any thread


class Artifact:
    """One of our artifacts; batches are counted in tokens."""

    batch_unit, first_batch = "tokens", 256

    def __init__(self, path: str, settings: str) -> None:
        from ettin.runtimes import Batch

        self._path, self._settings = path, json.loads(settings)
        self._runtime: Any = None
        self._batch: int | None = None
        for layout in ("padded", "laid_out"):
            setattr(Batch, layout, self._counted(getattr(Batch, layout)))

    @staticmethod
    def _counted(layout: Callable[..., Any]) -> Callable[..., Any]:
        def counted(batch: Any, multiple: int = 1) -> Any:
            ids, other = layout(batch, multiple)
            _BATCHES.append((ids.size, len(batch.ids)))
            return ids, other

        return counted

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        from ettin.runtimes import load

        if self._runtime is None or batch != self._batch:
            if self._runtime:
                self._runtime.close()
            self._batch = batch
            self._runtime = load(self._path, batch_tokens=batch, **self._settings)
            self.description = f"{self._runtime.description}, {self._runtime.limits.concurrency} at a time"
        return self._runtime.predict(pairs, max_length=max_length, activation_fn="identity")


class CrossEncoder:
    """sentence-transformers with an explicit dtype and SDPA; its own default is 32 pairs a batch."""

    batch_unit, first_batch = "pairs", 2

    def __init__(self, path: str, dtype: str, device: str = "cpu") -> None:
        import sentence_transformers
        import torch

        # Not through this project's loader: only sentence-transformers may be installed.
        options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        self._model = sentence_transformers.CrossEncoder(path, device=device, model_kwargs=options)
        self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._identity = torch.nn.Identity()
        self.description = f"sentence-transformers, {device}, {dtype}, SDPA, batch 32 unless told otherwise"

    @staticmethod
    def _count(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = (arguments[0] if arguments else named)["attention_mask"]
        _BATCHES.append((mask.numel(), int(mask.sum())))

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        self._model.max_seq_length = max_length
        options = {"batch_size": batch or 32, "activation_fn": self._identity, "show_progress_bar": False}
        return self._model.predict([list(pair) for pair in pairs], **options)


def imported(entry_point: str, *arguments: str) -> Any:
    """A contestant that the caller of the contest brings: "module:factory", and the arguments of the factory."""
    module, _, name = entry_point.partition(":")
    return getattr(import_module(module), name)(*arguments)


class Traced:
    """The direct routes to OpenVINO: the checkpoint's own graph traced as it is, or quantised by stock NNCF.

    Padded batches of at most 32 pairs of like lengths and 16,384 tokens. The precision is "default" (OpenVINO's own
    choice), "f32" or "int8" (NNCF's preset for transformers, on the project's own calibration text).
    """

    def __init__(self, path: str, precision: str) -> None:
        import openvino as ov
        import torch

        from ettin.export.quantise import calibration_text
        from ettin.export.reference import load_gold
        from ettin.export.source.checkpoint import read_checkpoint
        from ettin.runtimes import Batch
        from ettin.runtimes.tokenizer import PairTokenizer

        class Whole(torch.nn.Module):
            gold: Any

            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
                return self.gold({"input_ids": input_ids, "attention_mask": attention_mask})["scores"]

        whole = Whole()
        whole.gold = load_gold(read_checkpoint(Path(path)))
        self._tokenizer = PairTokenizer(Path(path) / "tokenizer.json")
        example = torch.randint(5, 200, (2, 40)), torch.ones(2, 40, dtype=torch.long)
        with torch.inference_mode():
            model = ov.convert_model(whole, example_input=example, input=[[-1, -1], [-1, -1]])
        if precision == "int8":
            import nncf

            sequences = calibration_text().sequences(self._tokenizer, 512)
            inputs = [list(Batch.of([ids], 0).padded()) for ids in sequences]
            preset = nncf.ModelType.TRANSFORMER
            model = nncf.quantize(model, nncf.Dataset(inputs), model_type=preset, subset_size=len(inputs))
        options = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "f32" else {}
        compiled = ov.Core().compile_model(model, "CPU", options)
        self._request = compiled.create_infer_request()
        rest = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.description = f"OpenVINO, traced as it is, {precision}, rest {rest}, batch 32"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        from ettin.runtimes import Batch
        from ettin.runtimes.batch import cut

        sequences = self._tokenizer.pairs(pairs, max_length)
        scores = [0.0] * len(pairs)
        for chosen in cut([len(ids) for ids in sequences], 16384, max_pairs=32):
            inputs = Batch.of([sequences[index] for index in chosen], 0).padded()
            for index, row in zip(chosen, self._request.infer(list(inputs))[0], strict=True):
                scores[index] = row[0]
        return scores


class Optimum:
    """Optimum's ONNX Runtime model, in padded batches of like lengths, 32 pairs by default."""

    batch_unit, first_batch = "pairs", 2

    def __init__(self, path: str) -> None:
        from optimum.onnxruntime import ORTModelForSequenceClassification
        from transformers import PreTrainedTokenizerFast

        self._model = ORTModelForSequenceClassification.from_pretrained(path)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        self.description = "Optimum with ONNX Runtime, batch 32 unless told otherwise"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
        scores = [0.0] * len(pairs)
        for start in range(0, len(order), batch or 32):
            chosen = order[start : start + (batch or 32)]
            options = {"padding": True, "truncation": "longest_first", "max_length": max_length, "return_tensors": "np"}
            inputs = self._tokenizer([list(pairs[index]) for index in chosen], **options)
            mask = inputs["attention_mask"]
            _BATCHES.append((mask.size, int(mask.sum())))
            logits = self._model(input_ids=inputs["input_ids"], attention_mask=mask).logits
            for index, row in zip(chosen, logits, strict=True):
                scores[index] = float(row[0])
        return scores


class FastEmbed:
    """fastembed with a custom model in a folder; its own default is 64 pairs a batch."""

    batch_unit, first_batch = "pairs", 2

    def __init__(self, path: str, model_file: str) -> None:
        from fastembed.common.model_description import ModelSource
        from fastembed.rerank.cross_encoder import TextCrossEncoder

        TextCrossEncoder.add_custom_model(model="ettin", model_file=model_file, sources=ModelSource(hf="from/a-folder"))
        self._model = TextCrossEncoder("ettin", specific_model_path=path)
        self.description = "fastembed, batch 64 unless told otherwise"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        self._model.model.tokenizer.enable_truncation(max_length)
        return list(self._model.rerank_pairs(list(pairs), batch_size=batch or 64))


class LlamaCpp:
    """llama.cpp with rank pooling, in batches of its own default size: it attends across all that is in one."""

    def __init__(self, path: str) -> None:
        import llama_cpp

        sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), 512)
        threads = dict.fromkeys(("n_threads", "n_threads_batch"), len(os.sched_getaffinity(0)))
        pooling = llama_cpp.LLAMA_POOLING_TYPE_RANK
        self._model = llama_cpp.Llama(path, embedding=True, pooling_type=pooling, verbose=False, **sizes, **threads)
        # Or the separator between query and document would not be read as the special token that it is.
        self._model.tokenize = partial(self._model.tokenize, special=True)
        self.description = f"llama.cpp, {Path(path).stem}, 512 tokens a batch"

    def predict(self, pairs: Pairs, max_length: int, batch: int | None) -> Any:
        return [row[0] for row in self._model.embed([f"{query}[SEP]{document}" for query, document in pairs])]


# Each has `predict(pairs, max_length, batch)`, which returns raw logits (batch: its maximum, in `batch_unit`; None: its
# own default), and `description`; those whose best batch can be searched say its unit and where to begin.
KINDS: dict[str, Callable[..., Any]] = {
    "artifact": Artifact,
    "cross-encoder": CrossEncoder,
    "fastembed": FastEmbed,
    "imported": imported,
    "llama-cpp": LlamaCpp,
    "optimum": Optimum,
    "traced": Traced,
}


def main() -> None:
    """Serves until stdin ends."""
    order = json.loads(sys.stdin.readline())
    pairs: Pairs = [tuple(pair) for pair in order["pairs"]]
    max_length, batch = order["max_length"], order["batch"]
    start = time.perf_counter()
    contestant = KINDS[order["kind"]](*order["arguments"])
    contestant.predict(pairs[:1], max_length, batch)
    load_s = time.perf_counter() - start
    versions = {package.name: package.version for package in distributions() if package.name in _PACKAGES}
    search = {key: getattr(contestant, key, None) for key in ("batch_unit", "first_batch")}
    _answer({"description": contestant.description, "versions": versions, "load_s": load_s, **search})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "batch":
            batch = asked["batch"]
            continue
        chosen = pairs if asked["do"] == "pass" else request_pairs(pairs, asked["request"], order["candidates"])
        _BATCHES.clear()
        start = time.perf_counter()
        scores, problem = [], None
        try:
            scores = contestant.predict(chosen, max_length, batch)
        except Exception as error:  # a batch that is too large for the memory, above all: smaller ones still work
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        seconds = time.perf_counter() - start
        given, real = (sum(tokens) for tokens in zip(*_BATCHES, strict=True)) if _BATCHES else (0, 0)
        memory = {"peak_rss_mib": _peak_rss_mib(), "peak_gpu_mib": _peak_gpu_mib()}
        padding = {"padding_share": 1 - real / given if given else None}
        if problem:
            _answer({"problem": problem})
            continue
        _answer({"seconds": seconds, **memory, **padding, "scores": [float(score) for score in scores]})


def request_pairs(pairs: Pairs, number: int, candidates: int) -> Pairs:
    """The documents from `number` · `candidates` on, round and round, with the query of the first one."""
    chosen = [pairs[(number * candidates + index) % len(pairs)] for index in range(candidates)]
    return [(chosen[0][0], document) for _, document in chosen]


def _peak_rss_mib() -> float:
    """Of this program alone: `getrusage` would begin with what the parent had when it started this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _peak_gpu_mib() -> float | None:
    """What torch took of the GPU since the last call; its cache is then given back to the others. None: not used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    peak_bytes = float(torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak_bytes / 2**20


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps({"ettin": values}), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
