"""Throughput by the release's method: every contestant at the batch size that suits it, then all of them in turns."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin.artifacts.errors import EttinError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.bench.contest import Child, Contest, Contestant, artifact_entries, measured, token_lengths, weights_of
from ettin.bench.texts import pairs_to_score, text_name
from ettin.graph import ModelShape
from ettin.runtimes.commands import console

# PyTorch as in the release's ablation table: contestants' kinds and arguments after the checkpoint's folder, for
# CPUs and, with FlashAttention-2, for GPUs.
SETTINGS: dict[str, tuple[str, ...]] = {
    "st-fp32": ("cross-encoder", "float32"),
    "st-bf16": ("cross-encoder", "bfloat16"),
    "fa2-padded": ("release", "bf16 FA2 padded"),
    "fa2-unpadded": ("release", "bf16 FA2 unpadded"),
}
_ON_GPUS = ("fa2-padded", "fa2-unpadded")

_FIRST = {"artifact": 256, "cross-encoder": 2, "release": 8}  # tokens, pairs, pairs
_GAIN = 1.02  # less is none
_LOSSES = 2  # doublings without a gain, after which nothing is expected of more


@dataclass(frozen=True)
class ThroughputRun:
    """See `ettin-bench throughput`.

    Args:
        artifacts: what is measured.
        checkpoint: what they were made from, for PyTorch; None: artifacts alone.
        settings: PyTorch's, of `SETTINGS`.
        data: see `pairs_to_score`.
        count: pairs in a pass.
        passes: timed, interleaved.
        requests: latency requests of each contestant, of `candidates` documents.
        candidates: documents of a request.
        max_length: tokens that pairs are truncated to.
        device: "cpu" or "cuda".
        load: settings of artifacts: threads, streams.
        probe: look for the best batch; False: everybody's own choice.
    """

    artifacts: Sequence[Path]
    checkpoint: Path | None
    settings: Sequence[str]
    data: Path | None
    count: int
    passes: int
    requests: int
    candidates: int
    max_length: int
    device: str
    load: Mapping[str, Any]
    probe: bool = True

    def measured(self) -> dict[str, Any]:
        """Runs it; the result.

        Raises:
            UsageError: settings that do not go together.
        """
        entries = self._entries()
        pairs = pairs_to_score(self.data, self.count)
        contest = Contest(
            pairs, min(self.candidates, len(pairs)), self.max_length, self.passes,
            requests=-(-self.requests // self.passes),
        )  # fmt: skip
        lengths = token_lengths(contest, self.artifacts[0])
        probes: dict[str, dict[str, Any]] = {}
        for entry in entries if self.probe else ():
            with console.step(f"{entry.name}: its best batch"):
                probes[entry.name] = _probe(contest, entry, most=max(sum(lengths), len(pairs)))
        results = measured(contest, entries, self.artifacts, lengths)
        manifest = Manifest.read(self.artifacts[0])
        shape = ModelShape.from_json(manifest.source.shape)
        gigaflop = sum(pair_flops(shape, length) for length in lengths) / len(pairs) / 1e9
        peaks = _peaks(self.device)
        for entry, each in zip(entries, results, strict=True):
            each["batch"] = {"unit": "tokens" if entry.kind == "artifact" else "pairs", **probes.get(entry.name, {})}
            if "pairs_per_s" in each:
                peak = peaks.get(self._arithmetic(entry))
                each["share_of_peak"] = each["pairs_per_s"] * gigaflop / peak if peak else None
        return {
            "name": manifest.name,
            "data": text_name(self.data),
            "weights": weights_of(self.artifacts),
            "pairs": len(pairs),
            "tokens_per_pair": sum(lengths) / len(pairs),
            "candidates": contest.candidates,
            "requests": contest.requests * self.passes,
            "passes": self.passes,
            "max_length": self.max_length,
            "device": self.device,
            "gigaflop_per_pair": gigaflop,
            "peak_gflop_per_s": peaks,
            "contestants": results,
        }

    def _entries(self) -> list[Contestant]:
        unknown = [name for name in self.settings if name not in SETTINGS]
        if unknown:
            raise UsageError(f"unknown setting '{unknown[0]}', expected some of: {', '.join(SETTINGS)}")
        if self.settings and self.checkpoint is None:
            raise UsageError("PyTorch's settings need the checkpoint: name it with --checkpoint DIR")
        entries = artifact_entries(self.artifacts, {"device": self.device, **self.load})
        for name in self.settings:
            kind, how = SETTINGS[name]
            if name in _ON_GPUS and self.device != "cuda":
                raise UsageError(f"setting '{name}' needs a GPU: --device cuda")
            more = {"cross-encoder": ["32", self.device], "release": [str(self.max_length), self.device]}[kind]
            entries.append(Contestant(name, kind, [str(self.checkpoint), how, *more]))
        return entries

    def _arithmetic(self, entry: Contestant) -> str:
        if entry.kind != "artifact":
            return "fp32" if SETTINGS[entry.name][1] == "float32" else "bf16"
        return Manifest.read(Path(entry.arguments[0])).precision


def _probe(contest: Contest, entry: Contestant, most: int) -> dict[str, Any]:
    """Doubles an entry's batch until that brings nothing, or memory ends; the entry keeps the best.

    Args:
        contest: whose pairs are scored.
        entry: who scores them.
        most: a batch of this size holds everything.
    """
    size, losses, stopped = _FIRST[entry.kind], 0, "no gain"
    found: dict[int, float] = {}
    try:
        with contest.started(entry) as child:
            while losses < _LOSSES:
                speed = len(contest.pairs) / _fastest(child, size)
                losses = losses + 1 if found and speed < _GAIN * max(found.values()) else 0
                found[size] = speed
                if size >= most:
                    stopped = "all pairs in one batch"
                    break
                size *= 2
    except EttinError as error:
        if not found:
            entry.problem = str(error)
            return {}
        stopped = str(error)
    entry.batch = max(found, key=lambda each: found[each])
    return {"best": entry.batch, "probed": {str(each): speed for each, speed in found.items()}, "stopped": stopped}


def _fastest(child: Child, size: int) -> float:
    """Seconds of the better of two passes: kernels are made in the first."""
    child.tell({"do": "batch", "batch": size})
    return min(float(child.ask({"do": "pass"})["seconds"]) for _ in range(2))


def pair_flops(shape: ModelShape, tokens: int) -> float:
    """Multiplications and additions that the published model needs for a pair, whatever a graph saves or wastes.

    Linear layers on real tokens; attention on the keys that a query sees; embedding, norms and head are left out.
    """
    hidden, layers = shape.hidden_size, shape.num_layers
    linear = 2.0 * tokens * layers * (4 * hidden**2 + 3 * hidden * shape.intermediate_size)
    seen = {True: float(tokens) * tokens, False: _seen_locally(tokens, shape.window_tokens)}
    return linear + sum(4.0 * hidden * seen[is_global] for is_global in shape.global_layers)


def _seen_locally(tokens: int, window: int) -> float:
    """Pairs of positions that are at most `window` apart."""
    reach = min(window, tokens - 1) if tokens else 0
    return float(tokens + 2 * (reach * tokens - reach * (reach + 1) // 2))


def _peaks(device: str) -> dict[str, float]:
    """The fastest large matrix product measured here, 10⁹ operations per second, by precision; those that could be."""
    if device == "cuda":
        return _gpu_peaks()
    try:
        from ettin.bench.profile import peak_gops
    except ModuleNotFoundError:
        return {}
    from ettin.runtimes.machine import available_cpus, has_bf16

    threads = available_cpus()
    precisions = {"fp32": ("f32", False), "int8": ("f32", True)} | ({"bf16": ("bf16", False)} if has_bf16() else {})
    return {name: peak_gops(hint, int8=int8, threads=threads) for name, (hint, int8) in precisions.items()}


def _gpu_peaks() -> dict[str, float]:
    import torch

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.matmul(a, b)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[name] = 2 * 8192**3 / min(times) / 1e9
    return found
