"""Requests of many callers in shared batches: scores reach their caller, faults stay alone, nobody waits for ever."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ettin.artifacts.errors import Busy, Closed, EttinError, Expired, InputError, ScoringError
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import scheduler as scheduler_module
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.request import Request
from ettin.runtimes.scheduler import Scheduler
from ettin.runtimes.tokenizer import PairTokenizer

TOKENIZER = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
LENGTH = 128
LIMIT = 400


class Engine:
    """Scores a pair with the sum of its ids; can be held up and made to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.poison: int | None = None
        self.failure: BaseException = RuntimeError("the engine broke")

    def score(self, batch: Batch) -> np.ndarray:
        self.open.wait(10)
        rows = np.split(batch.ids, batch.cu_seqlens[1:-1])
        self.batches.append([len(row) for row in rows])
        if self.poison is not None and any(self.poison in row for row in rows):
            raise self.failure
        return np.array([row.sum() % 65536 for row in rows], np.float32)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def scheduler_of(score: Callable[[Batch], np.ndarray], concurrency: int = 2) -> Scheduler:
    return Scheduler(TOKENIZER, score, BatchLimits(concurrency, batch_tokens=512), 0)


@pytest.fixture
def scheduler(engine: Engine) -> Iterator[Scheduler]:
    made = scheduler_of(engine.score)
    yield made
    engine.open.set()
    made.close()


def expected(pairs: list[tuple[str, str]]) -> list[float]:
    return [float(ids.sum() % 65536) for ids in TOKENIZER.pairs(pairs, 128)]


def submit(
    scheduler: Scheduler, pairs: list[tuple[str, str]], limit: int | None = LIMIT, wait: bool = False, **options: Any
) -> "Future[Any]":
    return scheduler.submit(Request(pairs, LENGTH, **options), max_waiting_pairs=limit, wait=wait)


def request(seed: int, count: int) -> list[tuple[str, str]]:
    generator = np.random.default_rng(seed)
    return [(f"query {seed}", "word " * int(generator.integers(0, 150)) + str(at)) for at in range(count)]


def test_the_waiting_caller_tokenises(scheduler: Scheduler, engine: Engine) -> None:
    pairs = request(1, 3000)
    assert scheduler.scored(Request(pairs, LENGTH)).logits.tolist() == expected(pairs)
    assert scheduler._threads.names == {"ettin-score-0", "ettin-score-1"}
    assert scheduler.scored(Request(pairs[:50], LENGTH, batch_pairs=3)).logits.tolist() == expected(pairs[:50])
    assert max(map(len, engine.batches[-10:])) <= 3
    assert scheduler.scored(Request([], LENGTH)).logits.shape == (0,)


def check(future: "Future[Any]", pairs: list[tuple[str, str]]) -> None:
    found = future.result(20)
    assert found.logits.tolist() == expected(pairs)
    assert found.tokens.tolist() == [len(ids) for ids in TOKENIZER.pairs(pairs, 128)]


def test_every_score_goes_home(scheduler: Scheduler, engine: Engine) -> None:
    requests = [request(seed, (1, 7, 100, 0, 300)[seed % 5]) for seed in range(40)]
    with ThreadPoolExecutor(16) as clients:
        futures = list(clients.map(lambda pairs: submit(scheduler, pairs, wait=True), requests))
    for future, pairs in zip(futures, requests, strict=True):
        check(future, pairs)
    assert scheduler.waiting_pairs == 0 and scheduler.pairs == sum(map(len, requests)) == sum(map(len, engine.batches))
    assert all(max(lengths) * len(lengths) <= 512 for lengths in engine.batches)


def test_requests_share_batches(scheduler: Scheduler, engine: Engine) -> None:
    engine.open.clear()
    futures = [(submit(scheduler, [("q", f"document {index}")]), [("q", f"document {index}")]) for index in range(60)]
    time.sleep(0.2)
    engine.open.set()
    for future, pairs in futures:
        check(future, pairs)
    assert len(engine.batches) < 20


def test_small_requests_overtake_a_large_one(scheduler: Scheduler) -> None:
    slow = scheduler_of(_slowly, 1)
    large = submit(slow, request(1, 4000))
    time.sleep(0.3)
    small = [submit(slow, [("q", "d")], None) for _ in range(5)]
    for future in small:
        future.result(5)
    assert not large.done()
    large.cancel()
    slow.close(drain_s=5)
    assert slow.waiting_pairs == 0


def _slowly(batch: Batch) -> np.ndarray:
    time.sleep(0.01)
    return np.zeros(len(batch), np.float32)


def test_a_fault_is_its_requests_alone(scheduler: Scheduler, engine: Engine) -> None:
    engine.open.clear()
    good, bad = request(1, 30), [("poison", "x" * 3)]
    engine.poison = int(TOKENIZER.texts(["poison"])["poison"][0])
    futures = [submit(scheduler, pairs) for pairs in (good, bad, [("q", "\ud800")], good)]
    engine.open.set()
    check(futures[0], good)
    check(futures[3], good)
    with pytest.raises(ScoringError, match="scoring failed: RuntimeError: the engine broke"):
        futures[1].result(5)
    with pytest.raises(InputError, match="not valid Unicode"):
        futures[2].result(5)
    assert scheduler.waiting_pairs == 0


def test_no_room_is_said(scheduler: Scheduler, engine: Engine) -> None:
    engine.open.clear()
    first = submit(scheduler, request(1, 500))
    with pytest.raises(Busy, match=r"500 pairs are waiting before this request, limit 400. Try again in \d+ s"):
        submit(scheduler, request(1, 500))
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(submit, scheduler, request(1, 500), wait=True)
        time.sleep(0.1)
        assert not waiting.done()
        engine.open.set()
        check(waiting.result(10), request(1, 500))
    check(first, request(1, 500))


def test_a_large_request_leaves_room_for_small_ones(scheduler: Scheduler, engine: Engine) -> None:
    """They are scored before it, so its pairs do not count for them."""
    engine.open.clear()
    large = submit(scheduler, request(1, 500))
    small = [submit(scheduler, request(2, 80)) for _ in range(5)]
    with pytest.raises(Busy, match="400 pairs are waiting before this request, limit 400"):
        submit(scheduler, request(2, 80))
    engine.open.set()
    check(large, request(1, 500))
    for future in small:
        check(future, request(2, 80))


def test_shrinking_requests_are_refused_at_last(scheduler: Scheduler, engine: Engine) -> None:
    """Each is scored before all others, so none has pairs before it."""
    engine.open.clear()
    with pytest.raises(Busy):
        for count in range(900, 300, -50):
            submit(scheduler, request(3, count), 400)


def test_thousands_of_waiting_requests_cost_little(
    scheduler: Scheduler, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch looks at all requests."""
    looks = 0
    due_s = Request.due_s

    def counted(request: Request, tokens_per_s: float) -> float:
        nonlocal looks
        looks += 1
        return due_s(request, tokens_per_s)

    monkeypatch.setattr(Request, "due_s", counted)
    engine.open.clear()
    futures = [submit(scheduler, [("q", f"d {index}")], None) for index in range(2000)]
    engine.open.set()
    for future in futures:
        future.result(20)
    assert looks < 10 * 2000


def test_nobody_wants_it_any_more(scheduler: Scheduler, engine: Engine) -> None:
    engine.open.clear()
    gone = threading.Event()
    left = submit(scheduler, request(1, 200), is_cancelled=gone.is_set)
    cancelled = submit(scheduler, request(2, 200))
    time.sleep(0.1)
    gone.set()
    assert cancelled.cancel()
    engine.open.set()
    check(submit(scheduler, request(3, 10), wait=True), request(3, 10))
    deadline = time.monotonic() + 5
    while scheduler.waiting_pairs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left.cancelled() and scheduler.waiting_pairs == 0
    assert scheduler.pairs < 100


def test_closing_drains_pending_requests(engine: Engine) -> None:
    scheduler = scheduler_of(engine.score)
    future = submit(scheduler, request(1, 300))
    assert scheduler.close("the server is stopping", drain_s=30)
    check(future, request(1, 300))
    for attempt in (lambda: submit(scheduler, [("q", "d")]), lambda: scheduler.scored(Request([("q", "d")], LENGTH))):
        with pytest.raises(Closed, match="the server is stopping"):
            attempt()


def test_closing_does_not_wait_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_JOIN_S", 0.2)
    scheduler = scheduler_of(engine.score, 1)
    engine.open.clear()
    future = submit(scheduler, request(1, 30))
    time.sleep(0.1)
    assert not scheduler.close(drain_s=0.2)  # the engine still has a batch, so it must not be freed
    with pytest.raises(Closed):
        future.result(1)
    engine.open.set()
    assert scheduler.close()


@pytest.mark.parametrize("way", ["submit", "logits", "room"])
def test_closing_ends_every_waiter(engine: Engine, way: str) -> None:
    """Finding 3: threads that wait for scores, or for room, while another thread closes."""
    scheduler = scheduler_of(engine.score)
    engine.open.clear()
    outcomes: list[str] = []

    def ask() -> None:
        try:
            if way == "logits":
                scheduler.scored(Request(request(1, 300), LENGTH))
            else:
                submit(scheduler, request(1, 300), 300, wait=way == "room").result(20)
            outcomes.append("scored")
        except EttinError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(1 if way == "submit" else 24)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    closer = threading.Thread(target=scheduler.close, daemon=True)
    closer.start()
    time.sleep(0.1)
    engine.open.set()
    for thread in [*threads, closer]:
        thread.join(10)
        assert not thread.is_alive()
    assert outcomes == ["Closed"] * len(threads)


class Panic(BaseException):
    """What a Rust library raises in Python when it panics is no `Exception` either."""


@pytest.mark.parametrize("failure", [Panic("rust"), MemoryError(), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_no_error_ends_a_worker(scheduler: Scheduler, engine: Engine, failure: BaseException) -> None:
    """Finding 10: whatever the engine raises fails that batch's requests, and the worker goes on."""
    engine.poison, engine.failure = int(TOKENIZER.texts(["poison"])["poison"][0]), failure
    for _ in range(5):
        bad, good = submit(scheduler, [("poison", "d")]), submit(scheduler, request(1, 30))
        with pytest.raises(ScoringError, match=type(failure).__name__) as caught:
            bad.result(10)
        assert caught.value.__cause__ is failure
        check(good, request(1, 30))
    with pytest.raises(ScoringError):
        scheduler.scored(Request([("poison", "d")], LENGTH))


@pytest.mark.parametrize("fault", ["tokenizer", "is_cancelled", "too few scores", "no array"])
def test_no_fault_beside_the_engine_ends_a_thread(fault: str, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    wrong = {"too few scores": np.zeros(0, np.float32), "no array": None}.get(fault, "right")
    scheduler = scheduler_of(engine.score if isinstance(wrong, str) else lambda batch: wrong)  # type: ignore[arg-type, return-value]

    def panic(*_: Any) -> Any:
        raise Panic("rust")

    if fault == "tokenizer":
        monkeypatch.setattr(TOKENIZER, "encoded", panic)
    for _ in range(4):
        future = submit(scheduler, [("q", "d")], is_cancelled=panic if fault == "is_cancelled" else lambda: False)
        with pytest.raises(ScoringError, match="Panic" if isinstance(wrong, str) else r"scores \(0?,?\) for 1 pairs"):
            future.result(10)
    monkeypatch.undo()
    if isinstance(wrong, str):
        check(submit(scheduler, request(1, 10)), request(1, 10))
    assert scheduler.waiting_pairs == 0
    scheduler.close()


def test_a_request_expires(scheduler: Scheduler, engine: Engine) -> None:
    engine.open.clear()
    held = submit(scheduler, request(1, 20), timeout_s=0.2)
    waiting = submit(scheduler, request(2, 20), timeout_s=0.3)
    for future in (held, waiting):
        with pytest.raises(Expired, match=r"not done after 0\.[23] s: 0 of 20 pairs were scored"):
            future.result(5)
    engine.open.set()
    check(submit(scheduler, request(3, 20), timeout_s=30), request(3, 20))
    assert scheduler.waiting_pairs == 0


def test_truncation_is_refused_before_anything_is_scored(scheduler: Scheduler, engine: Engine) -> None:
    pairs = [("q", "short")] * 300 + [("q", "word " * 300)]
    future = submit(scheduler, pairs, refuse_truncated=True)
    with pytest.raises(InputError, match="document 300 has, with its query, more than 128 tokens"):
        future.result(10)
    assert engine.batches == [] and scheduler.waiting_pairs == 0
    check(submit(scheduler, pairs[:300], refuse_truncated=True), pairs[:300])


def test_idle_threads_end_and_come_back(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(scheduler_module, "_IDLE_S", 0.05)
    scheduler = scheduler_of(engine.score)
    for _ in range(5):
        check(submit(scheduler, request(1, 10)), request(1, 10))
        deadline = time.monotonic() + 10
        while scheduler._threads.names and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not scheduler._threads.names
    gone = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert gone() is None  # nobody has to close it


def test_one_long_text_does_not_hold_the_others(scheduler: Scheduler, engine: Engine) -> None:
    """Finding 9: a text is cut before it is tokenised."""
    long = "a sentence of some words. " * 1_200_000  # 31 MB
    started = time.monotonic()
    held = submit(scheduler, [("q", long)])
    check(submit(scheduler, request(1, 10)), request(1, 10))
    assert held.result(20).tokens.tolist() == [LENGTH]
    assert time.monotonic() - started < 5  # took 14 s for 20 MB, whatever the machine does


def test_what_truncation_cuts_off_is_no_work() -> None:
    """A document of a million characters was scheduled as if all of them were scored, long after everything else."""
    long, filling = Request([("q", "word " * 200_000)], LENGTH), Request([("q", "word " * 200)], LENGTH)
    assert long.due_s(1000) - long.arrival_s == pytest.approx(filling.due_s(1000) - filling.arrival_s)
