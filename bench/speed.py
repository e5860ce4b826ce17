"""Speed of artifacts, alone or beside what a user would run instead: one contest, or one for each length."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin.artifacts.manifest import Manifest
from ettin.bench.contest import Contest, Contestant, figures
from ettin.bench.machine import artifact_name, size_mib
from ettin.bench.peaks import cpu_peaks, gpu_peaks, pair_flops
from ettin.bench.peers import peer_entries
from ettin.bench.workloads import pairs_to_score, text_name
from ettin.export.source.resolve import opened
from ettin.export.source.sizes import DEMO, SIZES
from ettin.graph import ModelShape
from ettin.runtimes.commands import console
from ettin.runtimes.machine import isa_limit
from ettin.runtimes.tokenizer import PairTokenizer

BEFORE = " (before)"  # ends the name of an artifact that runs in the environment of an earlier version
# What peers compute in, by their first argument.
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
_TOKENS_PER_LENGTH = 16384  # of a pass, roughly, where every pair has the same length


@dataclass(frozen=True)
class SpeedRun:
    """One run of `ettin-bench speed`; the fields are its options."""

    artifacts: Sequence[Path]
    checkpoint: str | None = None
    peers: Sequence[str] = ()
    environments: Path | None = None
    before: Path | None = None
    data: Path | None = None
    count: int | None = None
    rounds: int = 3
    requests: int = 21
    max_length: int = 512
    lengths: Sequence[int] = ()
    device: str = "cpu"
    load: Sequence[tuple[str, str]] = ()
    best_batch: bool = False

    def measured(self) -> dict[str, Any]:
        """The result of one contest; with `lengths`, "lengths" holds one for each."""
        weights = {Manifest.read(path).source.weights for path in self.artifacts}
        common = {
            "name": Manifest.read(self.artifacts[0]).name,
            "data": text_name(self.data),
            "weights": "random" if "random" in weights else "checkpoint",
            "device": self.device,
            "isa": (isa_limit() or "all").lower(),
            "load": self._settings,
            "rounds": self.rounds,
        }
        with ExitStack() as stack:
            folder, named = None, self.checkpoint
            if named:
                size, other = (named, None) if named in (DEMO, *SIZES) else (None, named)
                checkpoint = opened(size=size, checkpoint=other, random_weights=named in SIZES)
                folder = stack.enter_context(checkpoint).folder
            if not self.lengths:
                return {**common, **self._contest(folder, self.max_length)}
            return {**common, "lengths": [self._contest(folder, length, True) for length in self.lengths]}

    @property
    def _settings(self) -> dict[str, Any]:
        """Of artifacts, see `ettin.runtimes.load`."""
        return {name: int(value) if value.isdigit() else value for name, value in self.load}

    def _contest(self, checkpoint: Path | None, max_length: int, is_filled: bool = False) -> dict[str, Any]:
        shape = ModelShape.from_json(Manifest.read(self.artifacts[0]).source.shape)
        by_length = max(2, _TOKENS_PER_LENGTH // max_length) if is_filled else pairs_for(shape, self.device)
        pairs = pairs_to_score(self.data, self.count or by_length, max_length if is_filled else None)
        tokenizer = PairTokenizer(self.artifacts[0] / "tokenizer.json")
        lengths = [len(ids) for ids in tokenizer.pairs(pairs, max_length)]
        candidates, requests = min(100, len(pairs)), -(-self.requests // self.rounds)
        contest = Contest(pairs, candidates, max_length, self.rounds, requests, warm="cache_dir" in self._settings)
        with peer_entries(self.peers, checkpoint, self.artifacts, self.environments, self.device) as others:
            entries = [*self._artifact_entries(), *others]
            for entry in entries:
                entry.searches |= self.best_batch
            with console.step(f"{self.rounds} rounds of {len(pairs)} pairs, at most {max_length} tokens"):
                contest.run(entries)
        peaks = (cpu_peaks() if self.device == "cpu" else gpu_peaks()) if self.best_batch else {}
        gigaflop = sum(pair_flops(shape, length) for length in lengths) / len(pairs) / 1e9
        return {
            "pairs": len(pairs),
            "tokens_per_pair": sum(lengths) / len(pairs),
            "candidates": candidates,
            "requests": requests * self.rounds,
            "max_length": max_length,
            "filled": is_filled,
            "gigaflop_per_pair": gigaflop,
            "peak_gflop_per_s": peaks,
            "contestants": self._rows(entries, len(pairs), {name: peak / gigaflop for name, peak in peaks.items()}),
        }

    def _artifact_entries(self) -> list[Contestant]:
        settings = json.dumps({"device": self.device, **self._settings})
        entries = []
        for path in self.artifacts:
            name, arguments = artifact_name(path), [str(path), settings]
            if self.before:
                entries.append(Contestant(name + BEFORE, "artifact", arguments, python=str(self.before)))
            entries.append(Contestant(name, "artifact", arguments))
        return entries

    def _rows(
        self, entries: Sequence[Contestant], pairs: int, peak_pairs_per_s: Mapping[str, float]
    ) -> list[dict[str, Any]]:
        by_name = {entry.name: entry for entry in entries}
        reference = by_name.get("st-fp32", by_name.get("st-fp32-tuned"))
        artifacts = {artifact_name(path): path for path in self.artifacts}
        rows = []
        for entry in entries:
            before = by_name.get(entry.name + BEFORE)
            baseline = before if before and before.problem is None else reference or entries[0]
            row = figures(entry, pairs, reference, baseline)
            path = artifacts.get(entry.name.removesuffix(BEFORE))
            precision = Manifest.read(path).precision if path else _PRECISIONS.get("".join(entry.arguments[1:2]))
            peak = peak_pairs_per_s.get(str(precision))
            row["size_mib"] = size_mib(path) if path else None
            row["share_of_peak"] = row["pairs_per_s"] / peak if peak and "pairs_per_s" in row else None
            console.note(f"  {entry.name}: {row.get('description') or row['problem']}")
            rows.append(row)
        return rows


def pairs_for(shape: ModelShape, device: str) -> int:
    """Pairs of a pass, such that it takes seconds: 8 to 400 on a CPU, 256 to 4096 on a GPU, fewer of larger models."""
    least, most, work = (8, 400, 7e9) if device == "cpu" else (256, 4096, 1e11)
    return max(least, min(most, int(work / shape.num_parameters)))
