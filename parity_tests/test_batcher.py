"""Requests of many clients in shared batches: scores go home, small requests are not held up, faults stay alone."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ettin.artifacts.errors import Busy, InputError
from ettin.export.sizes import DEMO_FOLDER
from ettin.runtimes.batch import Batch
from ettin.runtimes.feeding import Limits
from ettin.runtimes.serving.batcher import Batcher
from ettin.runtimes.tokenizer import PairTokenizer

TOKENIZER = PairTokenizer(DEMO_FOLDER / "tokenizer.json")


class Engine:
    """Scores a pair with the sum of its ids; can be held up and made to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.poison: int | None = None

    def score(self, batch: Batch) -> np.ndarray:
        self.open.wait(10)
        rows = np.split(batch.ids, batch.cu_seqlens[1:-1])
        self.batches.append([len(row) for row in rows])
        if self.poison is not None and any(self.poison in row for row in rows):
            raise RuntimeError("the engine broke")
        return np.array([row.sum() % 65536 for row in rows], np.float32)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    made = Batcher(TOKENIZER, engine.score, Limits(concurrency=2, batch_tokens=512), 0, 128, max_waiting_pairs=400)
    yield made
    engine.open.set()
    made.close()


def expected(pairs: list[tuple[str, str]]) -> list[float]:
    return [float(ids.sum() % 65536) for ids in TOKENIZER.pairs(pairs, 128)]


def request(seed: int, count: int) -> list[tuple[str, str]]:
    generator = np.random.default_rng(seed)
    return [(f"query {seed}", "word " * int(generator.integers(0, 150)) + str(at)) for at in range(count)]


def check(future: "Future[Any]", pairs: list[tuple[str, str]]) -> None:
    found = future.result(20)
    assert found.logits.tolist() == expected(pairs)
    assert found.tokens.tolist() == [len(ids) for ids in TOKENIZER.pairs(pairs, 128)]


def test_every_score_goes_home(batcher: Batcher, engine: Engine) -> None:
    requests = [request(seed, (1, 7, 100, 0, 300)[seed % 5]) for seed in range(40)]
    with ThreadPoolExecutor(16) as clients:
        futures = list(clients.map(lambda pairs: batcher.submit(pairs, wait=True), requests))
    for future, pairs in zip(futures, requests, strict=True):
        check(future, pairs)
    assert batcher.waiting_pairs == 0 and batcher.pairs == sum(map(len, requests)) == sum(map(len, engine.batches))
    assert all(max(lengths) * len(lengths) <= 512 for lengths in engine.batches)


def test_requests_share_batches(batcher: Batcher, engine: Engine) -> None:
    engine.open.clear()
    futures = [(batcher.submit([("q", f"document {at}")]), [("q", f"document {at}")]) for at in range(60)]
    time.sleep(0.2)
    engine.open.set()
    for future, pairs in futures:
        check(future, pairs)
    assert len(engine.batches) < 20


def test_small_requests_overtake_a_large_one(batcher: Batcher) -> None:
    slow = Batcher(TOKENIZER, _slowly, Limits(concurrency=1, batch_tokens=512), 0, 128, max_waiting_pairs=9000)
    large = slow.submit(request(1, 4000))
    time.sleep(0.3)
    small = [slow.submit([("q", "d")]) for _ in range(5)]
    for future in small:
        future.result(5)
    assert not large.done()
    large.cancel()
    slow.close(5)
    assert slow.waiting_pairs == 0


def _slowly(batch: Batch) -> np.ndarray:
    time.sleep(0.01)
    return np.zeros(len(batch), np.float32)


def test_a_fault_is_its_requests_alone(batcher: Batcher, engine: Engine) -> None:
    engine.open.clear()
    good, bad = request(1, 30), [("poison", "x" * 3)]
    engine.poison = int(TOKENIZER.texts(["poison"])["poison"][0])
    futures = [batcher.submit(good), batcher.submit(bad), batcher.submit([("q", "\ud800")]), batcher.submit(good)]
    engine.open.set()
    check(futures[0], good)
    check(futures[3], good)
    with pytest.raises(RuntimeError, match="the engine broke"):
        futures[1].result(5)
    with pytest.raises(InputError, match="not valid Unicode"):
        futures[2].result(5)
    assert batcher.waiting_pairs == 0


def test_no_room_is_said(batcher: Batcher, engine: Engine) -> None:
    engine.open.clear()
    first = batcher.submit(request(1, 500))
    with pytest.raises(Busy, match=r"500 pairs are waiting, limit 400. Try again in \d+ s"):
        batcher.submit([("q", "d")])
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(batcher.submit, [("q", "d")], wait=True)
        time.sleep(0.1)
        assert not waiting.done()
        engine.open.set()
        check(waiting.result(10), [("q", "d")])
    check(first, request(1, 500))


def test_nobody_wants_it_any_more(batcher: Batcher, engine: Engine) -> None:
    engine.open.clear()
    gone = threading.Event()
    left, cancelled = batcher.submit(request(1, 200), gone.is_set), batcher.submit(request(2, 200))
    time.sleep(0.1)
    gone.set()
    assert cancelled.cancel()
    engine.open.set()
    check(batcher.submit(request(3, 10), wait=True), request(3, 10))
    deadline = time.monotonic() + 5
    while batcher.waiting_pairs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left.cancelled() and batcher.waiting_pairs == 0
    assert batcher.pairs < 100


def test_closing_finishes_what_it_has(engine: Engine) -> None:
    batcher = Batcher(TOKENIZER, engine.score, Limits(concurrency=2, batch_tokens=512), 0, 128)
    future = batcher.submit(request(1, 300))
    batcher.close()
    check(future, request(1, 300))
    with pytest.raises(Busy, match="the server is stopping"):
        batcher.submit([("q", "d")])


def test_closing_does_not_wait_for_ever(engine: Engine) -> None:
    batcher = Batcher(TOKENIZER, engine.score, Limits(concurrency=1, batch_tokens=512), 0, 128)
    engine.open.clear()
    future = batcher.submit(request(1, 30))
    time.sleep(0.1)
    batcher.close(0.2)
    with pytest.raises(Busy, match="stopped before this was scored"):
        future.result(1)
    engine.open.set()
