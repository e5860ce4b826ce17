"""The one harness that times things: contestants score the same pairs round by round, each in a process of its own.

A contest first searches the best batch of those contestants that want one. Then all processes start afresh, score
everything once without being timed, and take turns: one pass over all pairs and some latency requests a round. The
speed of a machine changes from minute to minute; in interleaved rounds the change meets every contestant, so ratios
within a round are more stable than any number.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ettin.artifacts.errors import EttinError
from ettin.artifacts.metrics import score_error
from ettin.bench.child import Child

_PROGRAM = Path(__file__).with_name("contestants.py")
_MIN_FOR_P99 = 20  # requests; the 99th percentile of fewer is their maximum
_GAIN = 1.02  # a smaller one is none
_LOSSES = 2  # doublings without a gain, after which the search for a batch ends


@dataclass
class Contestant:
    """One entry of a contest, and what the contest measured of it."""

    name: str  # artifacts have a "/" in theirs
    kind: str  # one of `contestants.KINDS`
    arguments: list[str]  # of that kind
    searches: bool = False  # its best batch is searched first
    python: str = sys.executable  # interpreter of the environment that it runs in
    problem: str | None = None  # why it can't take part, or why it stopped
    batch: int | None = None  # maximum, in tokens for artifacts and in pairs for others; None: its own default
    search: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    passes_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Contest:
    """What all contestants do."""

    pairs: Sequence[tuple[str, str]]  # scored in a pass
    candidates: int  # documents of a latency request
    max_length: int  # tokens that pairs are truncated to
    rounds: int  # timed passes of each contestant
    requests: int = 1  # latency requests in a round, each with other documents
    warm: bool = False  # load everything once before, so that a model cache is filled
    search_until: float = float("inf")  # `time.monotonic()` at which the search for batches ends
    load_until: float = float("inf")  # … at which every process must have loaded
    until: float = float("inf")  # … at which everything ends; what was measured by then counts
    # Start all processes at the same time, once for search and rounds; their load times and memory mean less.
    together: bool = False

    def run(self, entries: Sequence[Contestant]) -> None:
        """Fills in the entries. One that fails keeps the reason as its `problem` and takes no further part."""
        if not self.together and (self.warm or any(entry.searches for entry in entries)):
            with self._started(entries) as running:
                self._search(running)
        with self._started(entries) as running:
            if self.together:
                self._search(running)
            round_s = 0.0
            for number in range(self.rounds + 1):
                start = time.monotonic()
                if number > 1 and start + round_s > self.until:
                    break
                for entry, process in running:
                    if entry.problem is None:
                        self._round(entry, process, is_timed=number > 0)
                round_s = time.monotonic() - start

    def _search(self, running: Sequence[tuple[Contestant, Child]]) -> None:
        for index, (entry, process) in enumerate(running):
            if entry.problem is None and entry.searches and entry.facts["first_batch"]:
                self.search_batch(entry, process, len(running) - index)
                process.tell({"do": "batch", "batch": entry.batch})

    @contextmanager
    def _started(self, entries: Sequence[Contestant]) -> Iterator[list[tuple[Contestant, Child]]]:
        """The processes of all entries without a problem, loaded; they end with the block."""
        work = {"pairs": list(self.pairs), "candidates": self.candidates, "max_length": self.max_length}
        with ExitStack() as stack:
            running = []
            for entry in (entry for entry in entries if entry.problem is None):
                process = Child([str(_PROGRAM)], {"TOKENIZERS_PARALLELISM": "true"}, entry.python)
                stack.enter_context(process).end_at(self.load_until, if_silent=True)
                process.tell({"kind": entry.kind, "arguments": entry.arguments, "batch": entry.batch, **work})
                running.append((entry, process))
                if not self.together:
                    self._await_load(entry, process)
            for entry, process in running if self.together else ():
                self._await_load(entry, process)
            yield running

    def _await_load(self, entry: Contestant, process: Child) -> None:
        try:
            entry.facts = process.answer()
            process.end_at(self.until)
        except EttinError as error:
            entry.problem = str(error)

    def search_batch(self, entry: Contestant, process: Child, left: int = 1) -> None:
        """Doubles the batch until that brings nothing, memory or time ends, or one batch holds everything.

        The remaining time is shared by `left` searches.
        """
        end = time.monotonic() + (self.search_until - time.monotonic()) / left
        size, losses, stopped = entry.facts["first_batch"], 0, "no gain"
        most = len(self.pairs) * (self.max_length if entry.facts["batch_unit"] == "tokens" else 1)
        speeds: dict[int, float] = {}
        try:
            while losses < _LOSSES:
                process.tell({"do": "batch", "batch": size})
                # The faster one of two passes: kernels are compiled in the first.
                speed = len(self.pairs) / min(process.ask({"do": "pass"})["seconds"] for _ in range(2))
                losses = losses + 1 if speeds and speed < _GAIN * max(speeds.values()) else 0
                speeds[size] = speed
                if size >= most or time.monotonic() > end:
                    stopped = "all pairs in one batch" if size >= most else "out of time"
                    break
                size *= 2
        except EttinError as error:
            stopped = str(error)
        if not speeds:
            entry.problem = stopped
            return
        entry.batch = max(speeds, key=lambda size: speeds[size])
        probed = {str(size): speed for size, speed in speeds.items()}
        entry.search = {"best": entry.batch, "probed": probed, "stopped": stopped}

    def _round(self, entry: Contestant, process: Child, is_timed: bool) -> None:
        try:
            answers = [process.ask({"do": "pass"})]
            answers += [process.ask({"do": "latency", "request": number}) for number in range(self.requests)]
        except EttinError as error:
            entry.problem = str(error)
            return
        entry.scores = answers[0]["scores"]
        entry.facts["padding_share"] = answers[0]["padding_share"]
        for key in ("peak_rss_mib", "peak_gpu_mib"):
            entry.facts[key] = max((answer[key] for answer in answers if answer[key] is not None), default=None)
        if is_timed:
            entry.passes_s.append(answers[0]["seconds"])
            entry.latencies_s += [answer["seconds"] for answer in answers[1:]]


def figures(
    entry: Contestant, pairs: int, reference: Contestant | None = None, baseline: Contestant | None = None
) -> dict[str, Any]:
    """What a result says of a contestant after a contest.

    Its scores are compared with those of the reference, in logits. Its speed is divided by that of the baseline, round
    by round: median and range of the ratios.
    """
    if entry.problem is not None or not entry.passes_s:
        return {"name": entry.name, "problem": entry.problem}
    latencies_ms = 1000 * np.array(entry.latencies_s)
    percentiles = (50, 95, 99) if len(latencies_ms) >= _MIN_FOR_P99 else (50, 95)
    values: dict[str, Any] = {
        "name": entry.name,
        **{key: value for key, value in entry.facts.items() if key not in ("batch_unit", "first_batch")},
        "batch": {"unit": entry.facts.get("batch_unit"), **entry.search},
        "pairs_per_s": pairs / float(np.median(entry.passes_s)),
        "passes_s": entry.passes_s,
        "latencies_ms": latencies_ms.round(2).tolist(),
        **{f"latency_p{each}_ms": float(np.percentile(latencies_ms, each)) for each in percentiles},
        "nan": int(np.isnan(entry.scores).sum()),
    }
    if reference and reference.scores and not values["nan"]:
        values |= score_error(entry.scores, reference.scores).figures()
    if baseline and baseline is not entry and baseline.problem is None:
        ratios = np.array(baseline.passes_s) / np.array(entry.passes_s)
        median, low, high = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
        values["ratio"] = {"to": baseline.name, "median": median, "low": low, "high": high}
    return values
