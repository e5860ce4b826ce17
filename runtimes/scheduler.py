"""Scores the pairs of all callers in shared batches, for `predict` and for all servers.

Whenever the engine has room, a batch is cut from all pairs that wait at that moment. The request with the smallest
`arrival + 64 × remaining work` is next. So a request that is nearly done is finished first, equal requests are served
in order, small requests overtake large ones, and a large request is overtaken for at most 64 times as long as it takes
alone (as long as it would take if 64 clients shared the engine).

Threads start with the first work and end after a while without work, so a runtime that is not referred to any more is
freed even if it was not closed.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ettin.artifacts.errors import Busy, Closed, EttinError, ScoringError
from ettin.runtimes import processes
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.processes import Threads, join
from ettin.runtimes.request import Request, Scored, failing
from ettin.runtimes.score_cache import ScoreCache
from ettin.runtimes.tokenizer import PairTokenizer
from ettin.runtimes.waiting import Chosen, Entry, Waiting, requests_of

_TOKENISERS = 2  # threads that tokenise for callers that don't wait; for many texts each call uses all cores
_IDLE_S = 10.0  # time without work after which a thread ends
_JOIN_S = 30.0  # how long `close` waits for batches that the engine has begun
_SHOWN_EVERY_S = 0.1  # between two updates of a progress bar


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
        self._has_texts = threading.Condition(self._lock)  # tokenising threads wait for it
        self._has_pairs = threading.Condition(self._lock)  # scoring threads wait for it
        self._changed = threading.Condition(self._lock)  # callers wait for it: room, or the end of a request
        self._threads = Threads()
        self._waiting = Waiting()
        self._closing = ""  # the reason why nothing more is accepted
        self.batches = self.pairs = self.tokens = 0  # scored so far
        self.cache = ScoreCache()  # may be replaced before the first request
        self.on_batch: Callable[[int, int, float], object] = lambda *_: None  # its pairs, tokens and seconds; fast
        processes.close_at_exit(self)

    @property
    def waiting_pairs(self) -> int:
        """Pairs that were accepted and are not scored yet."""
        return self._waiting.pairs

    @property
    def queue_s(self) -> float:
        """Seconds that the waiting pairs will take at the measured speed."""
        mean = self.tokens / self.pairs if self.pairs else 128
        return self._waiting.pairs * mean / self._waiting.tokens_per_s

    def submit(self, request: Request, *, max_waiting_pairs: int | None = None, wait: bool = False) -> "Future[Scored]":
        """Accepts a request and returns at once.

        Args:
            request: a new one, of which this scheduler's threads tokenise the pairs.
            max_waiting_pairs: the request is refused while this many pairs wait that are scored before it; None: no
                limit.
            wait: block until there is room instead.

        Returns:
            The result. It fails with `InputError` for a text that can't be tokenised, with `ScoringError` if the
            engine failed with a batch of this request alone, with `Expired`, and with `Closed` if the scheduler was
            closed. Cancelling it ends the request.

        Raises:
            Busy: there is no room.
            Closed: the scheduler is closed, or belongs to the process that this one was forked from.
        """
        self._accept(request, max_waiting_pairs, wait)
        return request.future

    def scored(self, request: Request, progress: bool = False) -> Scored:
        """Scores a new request and waits for the result; the calling thread tokenises. Raises as `submit` says.

        Args:
            request: see `submit`.
            progress: show a progress bar on stderr.
        """
        request.caller_tokenises = True
        self._accept(request, None, wait=False)
        try:
            with tqdm(total=len(request.pairs), desc="Scoring pairs", unit="pairs", disable=not progress) as bar:
                while (part := self._next_slice(request)) is not None:
                    self._tokenise(request, part)  # not in `failing`: the caller gets what is raised here
                    bar.update(request.done - bar.n)
                while progress and not request.future.done():
                    wait([request.future], _SHOWN_EVERY_S)
                    bar.update(request.done - bar.n)
                scored = request.future.result()
                bar.update(len(request.pairs) - bar.n)
                return scored
        finally:
            self._end(request)  # after Ctrl-C, the caller does not want the rest

    def close(self, reason: str = "this scheduler is closed", drain_s: float = 0.0) -> bool:
        """Accepts nothing more, drains pending requests, then fails the rest with `Closed`.

        Args:
            reason: the text of the error.
            drain_s: time limit for pending requests.

        Returns:
            Whether the engine is idle, so that it can be released. A batch that it has begun is waited for, up to a
            limit.
        """
        if os.getpid() != self._process:
            return False  # the engine belongs to the parent process
        deadline_s = time.monotonic() + drain_s
        with self._lock:
            self._closing = self._closing or reason
            while self._waiting and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            left = [*self._waiting]
        for request in left:
            self._end(request, Closed(self._closing))
        with self._lock:
            self._wake_all()
            threads = self._threads.others()
        return join(threads, _JOIN_S)

    def _accept(self, request: Request, max_waiting_pairs: int | None, wait: bool) -> None:
        processes.refuse_child(self._process)  # first: in a child, a lock may be held for ever

        def refusal() -> Busy | None:
            return self._waiting.refusal(request, max_waiting_pairs, self.queue_s)

        with self._lock:
            while (busy := refusal()) and wait and not self._closing:
                self._changed.wait()
            if self._closing:
                raise Closed(self._closing)
            if busy is not None:
                raise busy
            if not request.pairs:
                request.succeed()
                return
            self._start_threads(request.caller_tokenises)
            self._waiting.add(request)
            self._has_texts.notify()

    def _start_threads(self, caller_tokenises: bool) -> None:
        """Starts the threads that are missing; called with the lock held."""
        self._threads.start("ettin-score", self._limits.concurrency, self._score_turn)
        if not caller_tokenises:
            self._threads.start("ettin-tokenise", _TOKENISERS, self._tokenise_turn)

    def _wake_all(self) -> None:
        for condition in (self._has_texts, self._has_pairs, self._changed):
            condition.notify_all()

    def _next(self, condition: threading.Condition, queue: list[Entry]) -> Request | None:
        """Waits for the first request of a queue, or for one that has expired; called with the lock held.

        Returns None if there was no work for a while; the thread is not counted any more and must end.
        """
        idle_until_s = time.monotonic() + _IDLE_S
        while True:
            now_s = time.monotonic()
            request = self._waiting.next(queue, now_s)
            if request is not None:
                return request
            if self._waiting:
                idle_until_s = now_s + _IDLE_S
            elif self._closing or now_s >= idle_until_s:
                self._threads.leave()
                return None
            condition.wait(max(0.0, min(idle_until_s, self._waiting.expiry_s) - now_s))

    def _take_slice(self, request: Request) -> range | None:
        part = request.take_slice()
        self._waiting.update(request)
        return part

    def _next_slice(self, request: Request) -> range | None:
        """The pairs that a waiting caller tokenises next, as soon as there is room for them; None: no more."""
        with self._lock:
            while request in self._waiting and request.has_untokenised and not request.has_room:
                self._changed.wait()
            return self._take_slice(request) if request in self._waiting else None

    def _tokenise_turn(self) -> bool:
        request: Request | None = None
        with failing(self._end, lambda: [request] if request else []):
            with self._lock:
                request = self._next(self._has_texts, self._waiting.to_tokenise)
                if request is None:
                    return False
                part = self._take_slice(request)
            if not self._ended_early(request) and part is not None:
                self._tokenise(request, part)
        return True

    def _tokenise(self, request: Request, part: range) -> None:
        texts = request.pairs[part.start : part.stop]
        encoded = self._tokenizer.encoded(texts, request.max_length, request.long_documents)
        request.check(encoded, part)
        with self._lock:
            left = request.left
            request.add(encoded, part, self.cache)
            self._waiting.pairs += (request.left - left) * (request in self._waiting)
            self._waiting.update(request)
            self._has_pairs.notify(self._limits.concurrency)
            self._has_texts.notify()
        self._end_done([request])

    def _score_turn(self) -> bool:
        chosen: Chosen = []
        with failing(self._end, lambda: requests_of(chosen)):
            with self._lock:
                first = self._next(self._has_pairs, self._waiting.to_score)
                if first is None:
                    return False
                if first.has_pairs:
                    chosen = self._waiting.next_batch(first, self._limits)
            ended = {request for request in {first, *requests_of(chosen)} if self._ended_early(request)}
            chosen = [pair for pair in chosen if pair[0] not in ended]
            if chosen:
                self._score_chosen(chosen)
        return True

    def _ended_early(self, request: Request) -> bool:
        """Ends a request that has expired or that nobody waits for, and returns whether the request is over."""
        if request.deadline_s <= time.monotonic():
            self._end(request, request.expired())
            return True
        with failing(self._end, lambda: [request]):
            if request.is_unwanted():
                self._end(request)
        return request not in self._waiting

    def _score_chosen(self, chosen: Chosen) -> None:
        started_s = time.monotonic()
        batch = Batch.of([ids for _, ids, _ in chosen], self._pad_token_id)
        try:
            scores = np.asarray(self._score(batch))
            if scores.shape != (len(batch),):
                raise ScoringError(f"the engine returned scores {scores.shape} for {len(batch)} pairs")
        except BaseException:
            requests = requests_of(chosen)
            if len(requests) == 1:
                raise
            for request in requests:  # each alone, to find the one that the engine can't score
                with failing(self._end, lambda request=request: [request]):  # type: ignore[misc]
                    self._score_chosen([pair for pair in chosen if pair[0] is request])
            return
        seconds = max(time.monotonic() - started_s, 1e-6)
        self.on_batch(len(batch), len(batch.ids), seconds)
        for (_, ids, _), score in zip(chosen, scores.tolist(), strict=True):
            self.cache.put(ids, score)
        speed = len(batch.ids) / seconds * (self._limits.concurrency if self._limits.in_parallel else 1)
        with self._lock:
            self._waiting.tokens_per_s += 0.05 * (speed - self._waiting.tokens_per_s)
            self.batches += 1
            self.pairs += len(batch)
            self.tokens += len(batch.ids)
            for (request, _, place), score in zip(chosen, scores.tolist(), strict=True):
                request.finish(place, score)
                self._waiting.pairs -= request in self._waiting
            for request in requests_of(chosen):
                request.note_batch(started_s, seconds)
                self._waiting.update(request)
            self._has_texts.notify()
            self._changed.notify_all()
        self._end_done(requests_of(chosen))

    def _end_done(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.is_done:
                self._end(request)

    def _end(self, request: Request, error: EttinError | None = None) -> None:
        """Ends a request that is done, failed or unwanted; tells its caller without the lock held."""
        with self._lock:
            if request not in self._waiting:
                return
            self._waiting.remove(request)
            self._wake_all()
        with suppress(InvalidStateError):  # cancelled
            if error is not None:
                request.future.set_exception(error)
            elif request.is_done:
                request.succeed()
            else:
                request.future.cancel()
