"""Part (b): a contest of the release's settings and ours on every size, each at its best batch, tokenising included."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ettin.bench.contest import Contest, Contestant, figures
from ettin.bench.peaks import gpu_peaks, pair_flops
from ettin.bench.speed import pairs_for
from ettin.bench.workloads import pairs_to_score
from ettin.export.source.sizes import SIZES
from ettin.export.source.weights import write_random_checkpoint
from ettin.gpu.visit.report import MAX_LENGTH, Report, Task
from ettin.gpu.visit.settings import GOLD, REFERENCE, SETTINGS
from ettin.graph import ModelShape
from ettin.runtimes.tokenizer import PairTokenizer

_TINY = replace(
    SIZES["17m"].shape, hidden_size=64, intermediate_size=96, num_heads=2, global_layers=(True, False, False, True)
)
_SEARCH_SHARE = 0.45  # of the time of a size, at most, for starting all settings and searching their best batches
_LOAD_SHARE = 0.6  # of the time until its end: one setting that hangs does not cost the others their rounds
_CONTESTANT = "ettin.gpu.visit.settings:TimedSetting"


def shape_of(size: str) -> ModelShape:
    """The shape of a released size, or of "tiny"."""
    return _TINY if size == "tiny" else SIZES[size].shape


def run(task: Task, report: Report) -> None:
    """Times the settings that start fast, size by size; none takes more than twice its share of the time."""
    _run(task, report, _timed(task, "speed"), 2)


def run_slow_starters(task: Task, report: Report) -> None:
    """Times the settings that take long to start, beside the reference."""
    slow = _timed(task, "compile")
    _run(task, report, [REFERENCE, *slow] if slow else [], len(task.sizes))


def _timed(task: Task, part: str) -> list[str]:
    """The settings that a part times on the device."""
    return [
        name
        for name, setting in SETTINGS.items()
        if setting.part == part
        and (name in task.settings or not task.settings)
        and (task.device == "cuda" or not setting.needs_gpu)
    ]


def _run(task: Task, report: Report, names: Sequence[str], shares: int) -> None:
    if not names:
        return
    peaks = gpu_peaks() if task.device == "cuda" else {}
    for index, size in enumerate(task.sizes):
        seconds = report.left_s / (len(task.sizes) - index)
        until = min(report.until, time.monotonic() + shares * seconds)
        report.attempt(size, partial(_size_speeds, task, names, size, until, seconds, peaks))


@contextmanager
def random_checkpoint(size: str, tokenizer: Path) -> Iterator[Path]:
    """A folder with a checkpoint of a size, with random weights and the tokenizer of another checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        write_random_checkpoint(Path(scratch), shape_of(size), 0, tokenizer)
        yield Path(scratch)


def _size_speeds(
    task: Task, names: Sequence[str], size: str, until: float, seconds: float, peaks: dict[str, float]
) -> dict[str, Any]:
    """A contest on one size; `seconds`: its share of the time, peaks: see `gpu_peaks`."""
    shape, start = shape_of(size), time.monotonic()
    pairs = pairs_to_score(task.data, pairs_for(shape, task.device) if task.device == "cuda" else 8)
    candidates = min(100, len(pairs))
    with random_checkpoint(size, task.checkpoint) as folder:
        entries = [
            Contestant(name, "imported", [_CONTESTANT, str(folder), name, task.device], searches=True) for name in names
        ]
        contest = Contest(
            pairs, candidates, MAX_LENGTH, 3, search_until=start + _SEARCH_SHARE * seconds,
            load_until=start + _LOAD_SHARE * (until - start), until=until, together=True,
        )  # fmt: skip
        contest.run(entries)
        lengths = [len(ids) for ids in PairTokenizer(folder / "tokenizer.json").pairs(pairs, MAX_LENGTH)]
    by_name = {entry.name: entry for entry in entries}
    rows = [figures(entry, len(pairs), by_name.get(GOLD), by_name.get(REFERENCE)) for entry in entries]
    flops = sum(pair_flops(shape, length) for length in lengths) / len(pairs)
    for row in rows:
        peak = peaks.get("fp32" if row["name"].startswith("fp32") else "bf16")
        row["share_of_peak"] = row["pairs_per_s"] * flops / peak / 1e9 if peak and "pairs_per_s" in row else None
    common = {"weights": "random", "pairs": len(pairs), "candidates": candidates, "peak_gflop_per_s": peaks}
    return {**common, "tokens_per_pair": sum(lengths) / len(pairs), "contestants": rows}
