"""Many clients against a server of ours: is every score right, what does serving cost, does memory stay."""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import numpy as np

from ettin.artifacts.errors import UsageError
from ettin.bench.cli_shared import about
from ettin.bench.load_servers import SERVERS, Ask, Asked, Served
from ettin.runtimes import Runtime, load

_SINGLES = 0.5  # of the requests under mixed load bring one document


@dataclass
class Tally:
    """What clients saw. Filled from several threads."""

    tolerance: float
    answers: int = 0
    pairs: int = 0
    wrong: int = 0
    max_abs_error: float = 0.0
    lost: list[str] = field(default_factory=list)
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, client: Ask, asked: Asked) -> None:
        """Asks, and compares the answer."""
        started = time.perf_counter()
        try:
            found = client(asked)
        except Exception as error:
            with self.lock:
                self.lost.append(f"{type(error).__name__}: {error}"[:200])
            return
        seconds = time.perf_counter() - started
        delta = np.abs(found - asked.gold).max(initial=0)
        with self.lock:
            self.answers += 1
            self.pairs += len(found)
            self.wrong += not delta <= self.tolerance  # a NaN is wrong
            self.max_abs_error = max(self.max_abs_error, float(delta))
            self.seconds[len(asked.documents)].append(seconds)

    def figures(self) -> dict[str, Any]:
        """For a result; latencies in milliseconds by number of documents."""
        latencies = {
            str(count): dict(
                zip(("p50", "p95", "p99"), (np.percentile(each, (50, 95, 99)) * 1000).tolist(), strict=True)
            )
            for count, each in sorted(self.seconds.items())
        }
        return {
            "answers": self.answers, "pairs": self.pairs, "wrong": self.wrong, "lost": len(self.lost),
            "first_errors": self.lost[:3], "max_abs_error": self.max_abs_error, "tolerance": self.tolerance,
            "latency_ms": latencies,
        }  # fmt: skip


def asked_of(
    runtime: Runtime, pairs: Sequence[tuple[str, str]], count: int, candidates: int, max_length: int
) -> tuple[list[Asked], float]:
    """Requests with their gold, and how far a score may be from it.

    A score depends a little on what shares its batch (padding, rounding): twice the largest such difference is allowed.

    Args:
        runtime: what scores in process.
        pairs: texts.
        count: requests.
        candidates: documents of each.
        max_length: tokens that pairs are truncated to.
    """
    documents = [document for _, document in pairs]
    texts = [
        (
            pairs[at % len(pairs)][0],
            [documents[(at * candidates + each) % len(documents)] for each in range(candidates)],
        )
        for at in range(count)
    ]
    flat = [(query, document) for query, each in texts for document in each]
    alone = runtime.predict(flat, batch_size=1, max_length=max_length, activation_fn="identity")
    mixed = runtime.predict(flat, max_length=max_length, activation_fn="identity")
    rows = alone.reshape(count, candidates)
    asked = [Asked(query, each, gold) for (query, each), gold in zip(texts, rows, strict=True)]
    return asked, 2 * float(np.abs(alone - mixed).max()) + 1e-4


def measured(
    artifact: Path, servers: Sequence[str], asked: Sequence[Asked], tolerance: float, runtime: Runtime,
    *, clients: int, rounds: int, minutes: float, max_length: int,
) -> dict[str, Any]:  # fmt: skip
    """Throughput beside the runtime in process, interleaved; then mixed load for some minutes, a server at a time.

    Args:
        artifact: what is served.
        servers: of `SERVERS`.
        asked: see `asked_of`.
        tolerance: see `asked_of`.
        runtime: the same artifact in this process.
        clients: at the same time.
        rounds: of the throughput.
        minutes: of mixed load.
        max_length: tokens that pairs are truncated to.
    """
    unknown = set(servers) - set(SERVERS)
    if unknown:
        raise UsageError(f"unknown server '{unknown.pop()}', expected one of: {', '.join(SERVERS)}")
    flat = [(each.query, document) for each in asked for document in each.documents]
    speeds: dict[str, list[float]] = defaultdict(list)
    tallies = {name: Tally(tolerance) for name in servers}
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        running = {name: stack.enter_context(SERVERS[name](artifact, max_length)) for name in servers}
        asks = {name: [served.client() for _ in range(clients)] for name, served in running.items()}
        for number in range(rounds + 1):  # the first warms up
            seconds = _timed(lambda: runtime.predict(flat, max_length=max_length))
            if number:
                speeds["in process"].append(len(flat) / seconds)
            for name in servers:
                tally = tallies[name] if number else Tally(tolerance)
                seconds = _timed(lambda name=name, tally=tally: _once_each(asks[name], asked, tally))  # type: ignore[misc]
                if number:
                    speeds[name].append(len(flat) / seconds)
        for name, served in running.items():
            mixed, memory = mixed_load(served, asks[name], asked, tolerance, minutes * 60)
            results[name] = {
                "full": tallies[name].figures(), "mixed": mixed.figures(), "mixed_seconds": minutes * 60,
                "memory_mib": memory,
            }  # fmt: skip
    base = median(speeds["in process"])
    return {
        "in_process_pairs_per_s": speeds["in process"],
        "servers": {
            name: {"pairs_per_s": speeds[name], "share_of_in_process": median(speeds[name]) / base, **results[name]}
            for name in servers
        },
    }


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _once_each(clients: Sequence[Ask], asked: Sequence[Asked], tally: Tally) -> None:
    left: SimpleQueue[Asked] = SimpleQueue()
    for each in asked:
        left.put(each)

    def work(client: Ask) -> None:
        while True:
            try:
                tally.ask(client, left.get_nowait())
            except Empty:
                return

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(work, clients))


def mixed_load(
    served: Served, clients: Sequence[Ask], asked: Sequence[Asked],
    tolerance: float, seconds: float,
) -> tuple[Tally, list[float]]:  # fmt: skip
    """Every client asks again and again, for one document of a request or for all of them.

    Args:
        served: the server.
        clients: one for each thread.
        asked: the requests.
        tolerance: see `asked_of`.
        seconds: how long.

    Returns:
        What the clients saw, and the server's memory in MiB at every twentieth of the time.
    """
    tally, deadline = Tally(tolerance), time.monotonic() + seconds

    def work(number: int) -> None:
        choice = random.Random(number)  # noqa: S311
        while time.monotonic() < deadline:
            each = choice.choice(asked)
            if choice.random() < _SINGLES:
                at = choice.randrange(len(each.documents))
                each = Asked(each.query, [each.documents[at]], each.gold[at : at + 1])
            tally.ask(clients[number], each)

    memory: list[float] = []
    with ThreadPoolExecutor(len(clients)) as pool:
        working = [pool.submit(work, number) for number in range(len(clients))]
        while time.monotonic() < deadline:
            time.sleep(seconds / 20)
            memory.append(round(served.memory_mib(), 1))
        for each in working:
            each.result()
    return tally, memory


def run(
    artifact: Path, servers: Sequence[str], pairs: Sequence[tuple[str, str]], *, clients: int, requests: int,
    candidates: int, rounds: int, minutes: float, max_length: int,
) -> dict[str, Any]:  # fmt: skip
    """All of it; see `asked_of` and `measured`."""
    with load(artifact) as runtime:
        length = min(max_length, runtime.max_length)
        asked, tolerance = asked_of(runtime, pairs, requests, candidates, length)
        found = measured(
            artifact, servers, asked, tolerance, runtime, clients=clients, rounds=rounds, minutes=minutes,
            max_length=length,
        )  # fmt: skip
        facts = about(runtime)
    settings = {"clients": clients, "requests": requests, "candidates": candidates, "rounds": rounds,
                "minutes": minutes, "max_length": length}  # fmt: skip
    return {**facts, **settings, **found}
