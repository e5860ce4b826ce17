"""Pairs of all callers → shared batches → to each caller its own scores. One for `predict` and for every server.

Whenever the engine has room, a batch is cut from all pairs that wait at that moment, whoever sent them. The request
with the smallest `arrival + 64 × remaining work` is next. So a request that is nearly done is finished first, equal
requests are served in order, small requests overtake large ones, and a large request is overtaken for at most 64 times
as long as it takes alone (as long as it would take if 64 clients shared the engine).

Threads start with the first work and end when there was none for a while, so a runtime that nobody refers to any more
is freed, closed or not.
"""

import atexit
import os
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ettin.artifacts.errors import Busy, Closed, EttinError, HardwareError, ScoringError
from ettin.runtimes.batch import Batch, BatchLimits, Ids, round_up
from ettin.runtimes.inputs import Pair
from ettin.runtimes.request import Progress, Request, Scored
from ettin.runtimes.tokenizer import PairTokenizer

_CHOICE = 4  # batches' worth of pairs to choose from: as little padding as with 32, and requests end in order
_FIRST_SPEED = 20_000.0  # tokens/s, until measured
_TOKENISERS = 2  # threads that tokenise for callers that don't wait; each call uses all cores for many texts
_IDLE_S = 10.0  # a thread without work for this long ends
_PAUSE_S = 0.01  # after an error that belongs to no request
_JOIN_S = 30.0  # how long `close` waits for batches that the engine has begun

_Chosen = list[tuple[Request, Ids, int]]


_alive: "weakref.WeakSet[Scheduler]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends batches before the interpreter ends: engines do not survive that it is torn down around them."""
    for scheduler in list(_alive):
        scheduler.close("the process is ending")


class Scheduler:
    """Scores the requests of many threads with one engine.

    Args:
        tokenizer: tokenises the pairs.
        score: scores a batch, float32 [pairs]; called from `limits.concurrency` threads.
        limits: the batches that the engine takes.
        pad_token_id: pads the batches.
    """

    def __init__(
        self,
        tokenizer: PairTokenizer,
        score: Callable[[Batch], NDArray[np.float32]],
        limits: BatchLimits,
        pad_token_id: int,
    ) -> None:
        self._tokenizer, self._score, self._limits, self._pad_token_id = tokenizer, score, limits, pad_token_id
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._has_texts = threading.Condition(self._lock)  # tokenisers wait for it
        self._has_pairs = threading.Condition(self._lock)  # workers wait for it
        self._changed = threading.Condition(self._lock)  # callers wait for it: room, or the end of a request
        self._threads: set[threading.Thread] = set()
        self._requests: dict[Request, None] = {}  # in order of their arrival
        self._waiting_pairs = 0  # not scored yet
        self._closing = ""  # why nothing more is accepted
        self._tokens_per_s = _FIRST_SPEED
        self.batches = self.pairs = self.tokens = 0  # scored so far
        _alive.add(self)

    @property
    def waiting_pairs(self) -> int:
        """Pairs that were accepted and are not scored yet."""
        return self._waiting_pairs

    @property
    def queue_s(self) -> float:
        """Seconds that the waiting pairs will take, at the measured speed."""
        mean = self.tokens / self.pairs if self.pairs else 128
        return self._waiting_pairs * mean / self._tokens_per_s

    def submit(
        self,
        pairs: Sequence[Pair],
        max_length: int,
        *,
        is_cancelled: Callable[[], bool] = lambda: False,
        timeout_s: float | None = None,
        refuse_truncated: bool = False,
        max_waiting_pairs: int | None = None,
        wait: bool = False,
    ) -> "Future[Scored]":
        """Accepts a request and returns at once.

        Args:
            pairs: (query, document).
            max_length: tokens that pairs are truncated to.
            is_cancelled: whether the caller does not want the result any more; asked before each batch of the
                request. Cancelling the future has the same effect.
            timeout_s: the request fails with `Expired` when it is not done after this time; None: no limit.
            refuse_truncated: the request fails with `InputError`, before any of its pairs is scored, if one of them
                would be truncated.
            max_waiting_pairs: the request is refused while this many pairs wait; None: no limit.
            wait: block until there is room instead.

        Returns:
            The result. It fails with `InputError` for a text that can't be tokenised, with `ScoringError` if the
            engine failed with a batch of this request alone, with `Closed` if the scheduler was closed.

        Raises:
            Busy: there is no room.
            Closed: the scheduler is closed, or belongs to the process that this one was forked from.
        """
        request = Request(pairs, max_length, is_cancelled, timeout_s, refuse_truncated=refuse_truncated)
        self._accept(request, max_waiting_pairs, wait)
        return request.future

    def logits(
        self, pairs: Sequence[Pair], max_length: int, batch_pairs: int | None = None, progress: bool = False
    ) -> NDArray[np.float32]:
        """Scores pairs and waits for the result; the calling thread tokenises.

        Args:
            pairs: (query, document).
            max_length: tokens that pairs are truncated to.
            batch_pairs: maximum number of pairs in a batch; None: the limits alone.
            progress: show a progress bar on stderr.

        Returns:
            Raw logits, float32 [pairs], in the order of the pairs.

        Raises:
            InputError: a text that can't be tokenised.
            ScoringError: the engine failed.
            Closed: the scheduler was closed, or belongs to the process that this one was forked from.
        """
        request = Request(pairs, max_length, batch_pairs=batch_pairs, caller_tokenises=True)
        self._accept(request, None, wait=False)
        try:
            with tqdm(total=len(pairs), desc="Scoring pairs", unit="pairs", disable=not progress) as bar:
                shown = Progress(request, bar)
                while (part := self._next_slice(request)) is not None:
                    self._tokenise(request, part)  # not in `_failing`: what is raised here is the caller's own
                    shown.update()
                return shown.result().logits
        finally:
            self._end(request)  # an interrupted caller, such as by Ctrl-C, does not want the rest

    def close(self, reason: str = "this scheduler is closed", drain_s: float = 0.0) -> bool:
        """Accepts nothing more, drains pending requests for at most `drain_s`, then fails the rest with `Closed`.

        Args:
            reason: the text of the error.
            drain_s: seconds that pending requests are given.

        Returns:
            Whether the engine is idle, so that it can be freed. A batch that it has begun is waited for, but not
            for ever.
        """
        if os.getpid() != self._process:
            return False  # its engine belongs to the parent process
        deadline_s = time.monotonic() + drain_s
        with self._lock:
            self._closing = self._closing or reason
            while self._requests and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            left = [*self._requests]
        for request in left:
            self._end(request, Closed(self._closing))
        with self._lock:
            threads = self._threads - {threading.current_thread()}
            self._wake_all()
        deadline_s = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _accept(self, request: Request, max_waiting_pairs: int | None, wait: bool) -> None:
        self._refuse_fork()

        def is_full() -> bool:
            return max_waiting_pairs is not None and self._waiting_pairs >= max_waiting_pairs

        with self._lock:
            while wait and not self._closing and is_full():
                self._changed.wait()
            if self._closing:
                raise Closed(self._closing)
            if is_full():
                raise Busy(f"{self._waiting_pairs} pairs are waiting, limit {max_waiting_pairs}", self.queue_s)
            if not request.pairs:
                request.succeed()
                return
            self._start_threads(request.caller_tokenises)
            self._requests[request] = None
            self._waiting_pairs += len(request.pairs)
            self._has_texts.notify()

    def _refuse_fork(self) -> None:
        """Threads and engines do not survive a fork, and a lock may be held for ever: no waiting here.

        Raises:
            Closed: this process was forked from the one that loaded the engine.
        """
        if os.getpid() != self._process:
            raise Closed(
                f"this runtime was loaded in process {self._process}, from which process {os.getpid()} was forked; "
                "engines do not survive a fork. Load the artifact in each process after the fork, or start processes "
                "with the method 'spawn'"
            )

    def _start_threads(self, caller_tokenises: bool) -> None:
        """Starts the threads that are missing; called with the lock held.

        Raises:
            HardwareError: the system starts no thread, and there is none.
        """
        wanted = [(f"ettin-score-{number}", self._score_turn) for number in range(self._limits.concurrency)]
        if not caller_tokenises:
            wanted += [(f"ettin-tokenise-{number}", self._tokenise_turn) for number in range(_TOKENISERS)]
        names = {thread.name for thread in self._threads}
        for name, turn in wanted:
            if name in names:
                continue
            thread = threading.Thread(target=self._supervised, args=(turn,), name=name, daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError as error:
                self._threads.remove(thread)
                if not any(alive.name.startswith(name[:8]) for alive in self._threads):
                    raise HardwareError(f"the system starts no more threads ({error}). Raise its limit") from None

    def _supervised(self, turn: Callable[[], bool]) -> None:
        """The life of a thread: turns until one finds no more work. No error ends it."""
        while True:
            with suppress(BaseException):
                if not turn():
                    return
                continue
            time.sleep(_PAUSE_S)

    def _wake_all(self) -> None:
        for condition in (self._has_texts, self._has_pairs, self._changed):
            condition.notify_all()

    def _next(self, condition: threading.Condition, has_work: Callable[[Request], object]) -> Request | None:
        """Waits for the next request that has such work, or is expired. Called with the lock held.

        Returns:
            None: there was no work for a while, and the thread must end: it is not counted any more.
        """
        idle_until_s = time.monotonic() + _IDLE_S
        while True:
            now_s = time.monotonic()
            ready = [request for request in self._requests if request.deadline_s <= now_s or has_work(request)]
            if ready:
                return min(ready, key=lambda request: (request.deadline_s > now_s, self._due_s(request)))
            if self._requests:
                idle_until_s = now_s + _IDLE_S
            elif self._closing or now_s >= idle_until_s:
                self._threads.discard(threading.current_thread())
                return None
            expiry_s = min((request.deadline_s for request in self._requests), default=idle_until_s)
            condition.wait(max(0.0, min(idle_until_s, expiry_s) - now_s))

    def _due_s(self, request: Request) -> float:
        return request.due_s(self._tokens_per_s)

    @contextmanager
    def _failing(self, requests: Callable[[], Sequence[Request]]) -> Iterator[None]:
        """Fails requests with whatever is raised, `MemoryError`, a panic of a Rust library and `SystemExit` included.

        Args:
            requests: those that are affected, asked when something was raised.
        """
        try:
            yield
        except BaseException as error:
            named = error if isinstance(error, EttinError) else _named(error)
            affected = requests()
            for request in affected:
                self._end(request, named)
            if not affected:
                time.sleep(_PAUSE_S)

    def _next_slice(self, request: Request) -> range | None:
        """The pairs that a waiting caller tokenises next, when there is room for them; None: no more."""
        with self._lock:
            while request in self._requests and request.has_untokenised and not request.has_room:
                self._changed.wait()
            return request.take_slice() if request in self._requests else None

    def _tokenise_turn(self) -> bool:
        request: Request | None = None
        with self._failing(lambda: [request] if request else []):
            with self._lock:
                request = self._next(self._has_texts, lambda each: each.has_room and not each.caller_tokenises)
                if request is None:
                    return False
                part = request.take_slice()
            if not self._ended_early(request) and part is not None:
                self._tokenise(request, part)
        return True

    def _tokenise(self, request: Request, part: range) -> None:
        encoded = self._tokenizer.encoded(request.pairs[part.start : part.stop], request.max_length)
        request.check(encoded, part)
        with self._lock:
            request.add(encoded, part)
            self._has_pairs.notify(self._limits.concurrency)
            self._has_texts.notify()

    def _score_turn(self) -> bool:
        chosen: _Chosen = []
        with self._failing(lambda: _requests_of(chosen)):
            with self._lock:
                first = self._next(self._has_pairs, lambda request: request.has_pairs)
                if first is None:
                    return False
                chosen = self._chosen(first) if first.has_pairs else []
            ended = {
                request for request in {first: None} | dict.fromkeys(_requests_of(chosen)) if self._ended_early(request)
            }
            chosen = [pair for pair in chosen if pair[0] not in ended]
            if chosen:
                self._score_chosen(chosen)
        return True

    def _ended_early(self, request: Request) -> bool:
        """Ends a request that nobody waits for any more, or whose time is over; whether it was one."""
        if request.deadline_s <= time.monotonic():
            self._end(request, request.expired())
            return True
        with self._failing(lambda: [request]):
            if request.is_unwanted():
                self._end(request)
        return request not in self._requests

    def _chosen(self, first: Request) -> _Chosen:
        """The next batch: the longest pair of `first`, and the longest pairs of all requests that fit beside it."""
        limits = self._limits
        width = round_up(first.lengths[-1], limits.length_multiple)
        budget = limits.batch_tokens
        if limits.in_parallel:  # little work is divided among the streams
            waiting_tokens = sum(request.waiting_tokens for request in self._requests)
            budget = min(budget, -(-waiting_tokens // limits.concurrency))
        sizes = (max(1, budget // width), limits.batch_pairs, first.batch_pairs)
        count = min(size for size in sizes if size is not None)
        chosen = [first.take(len(first.lengths) - 1)]
        offers: list[tuple[int, int, Request]] = []
        for request in sorted(self._requests, key=self._due_s):
            if not request.has_pairs or (request.batch_pairs or count) < count:
                continue
            end = bisect_right(request.lengths, width)
            offers += [(request.lengths[index], index, request) for index in range(max(0, end - count + 1), end)]
            if len(offers) >= _CHOICE * (count - 1):
                break
        best = sorted(offers, key=lambda offer: -offer[0])[: count - 1]
        # From the end of each request, so that the other indices stay what they are.
        return chosen + [request.take(index) for _, index, request in sorted(best, key=lambda offer: -offer[1])]

    def _score_chosen(self, chosen: _Chosen) -> None:
        started_s = time.monotonic()
        batch = Batch.of([ids for _, ids, _ in chosen], self._pad_token_id)
        try:
            scores = np.asarray(self._score(batch))
            if scores.shape != (len(batch),):
                raise ScoringError(f"the engine returned scores {scores.shape} for {len(batch)} pairs")
        except BaseException:
            requests = _requests_of(chosen)
            if len(requests) == 1:
                raise
            for request in requests:  # who sent the pair that the engine can't score is found by scoring each alone
                with self._failing(lambda request=request: [request]):  # type: ignore[misc]
                    self._score_chosen([pair for pair in chosen if pair[0] is request])
            return
        seconds = max(time.monotonic() - started_s, 1e-6)
        speed = len(batch.ids) / seconds * (self._limits.concurrency if self._limits.in_parallel else 1)
        with self._lock:
            self._tokens_per_s += 0.05 * (speed - self._tokens_per_s)
            self.batches += 1
            self.pairs += len(batch)
            self.tokens += len(batch.ids)
            for (request, _, place), score in zip(chosen, scores.tolist(), strict=True):
                request.logits[place] = score
                request.done += 1
                self._waiting_pairs -= request in self._requests
            self._has_texts.notify()
            self._changed.notify_all()
        for request in _requests_of(chosen):
            if request.is_done:
                self._end(request)

    def _end(self, request: Request, error: EttinError | None = None) -> None:
        """The request is done, failed or unwanted. Its caller is told without the lock held."""
        with self._lock:
            if not self._remove(request):
                return
        with suppress(InvalidStateError):  # cancelled
            if error is not None:
                request.future.set_exception(error)
            elif request.is_done:
                request.succeed()
            else:
                request.future.cancel()

    def _remove(self, request: Request) -> bool:
        if request not in self._requests:
            return False
        del self._requests[request]
        self._waiting_pairs -= len(request.pairs) - request.done
        self._wake_all()
        return True


def _requests_of(chosen: _Chosen) -> list[Request]:
    return list(dict.fromkeys(request for request, _, _ in chosen))


def _named(error: BaseException) -> ScoringError:
    named = ScoringError(f"scoring failed: {type(error).__name__}: {error}".partition("\n")[0][:300])
    named.__cause__ = error
    return named
