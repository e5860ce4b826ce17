"""Requests of many clients → shared batches → to each request its own scores.

Whenever the engine has room, a batch is cut from what waits then, whoever sent it; no request waits for another's last
document. Who is next: arrival + 64 × the work that is left. So what is nearly done is finished first, equal requests
are served in order, small ones overtake large ones, and a large one waits at most 64 times as long as it takes alone
before nothing new overtakes it (as long as it would take if 64 clients shared the engine).
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.errors import Busy
from ettin.runtimes.base import Runtime
from ettin.runtimes.batch import Batch, Ids, round_up
from ettin.runtimes.feeding import Limits
from ettin.runtimes.inputs import Pair
from ettin.runtimes.tokenizer import PairTokenizer

_SLICE_PAIRS = 128  # tokenised at a time, so that a large request does not keep others from it
_CHOICE = 4  # batches' worth of pairs to choose from: as little padding as with 32, and requests end in order
_PATIENCE = 64
_CHARACTERS_PER_TOKEN = 4  # English text; only decides who is next
_FIRST_SPEED = 20_000.0  # tokens/s, until measured


@dataclass(frozen=True)
class Scored:
    """A request's result.

    Args:
        logits: raw, float32 [pairs], in the order of the pairs.
        tokens: of each pair, as scored, int32 [pairs].
    """

    logits: NDArray[np.float32]
    tokens: NDArray[np.int32]


@dataclass(eq=False)
class _Request:
    pairs: Sequence[Pair]
    arrival_s: float
    is_cancelled: Callable[[], bool]
    future: Future[Scored] = field(default_factory=Future)
    tokenised: int = 0
    # Tokenised and waiting, shortest first: lengths, and beside them ids and places.
    lengths: list[int] = field(default_factory=list)
    waiting: list[tuple[Ids, int]] = field(default_factory=list)
    waiting_tokens: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        self.work_tokens = sum(len(query) + len(document) for query, document in self.pairs) / _CHARACTERS_PER_TOKEN
        self.logits = np.empty(len(self.pairs), np.float32)
        self.tokens = np.empty(len(self.pairs), np.int32)

    def is_unwanted(self) -> bool:
        """Whether nobody waits for it any more. Not asked under a lock: the answer may come from another process."""
        return self.future.cancelled() or self.is_cancelled()

    def due_s(self, tokens_per_s: float) -> float:
        """When it should be done; see the top."""
        left = self.work_tokens * (1 - self.done / len(self.pairs))
        return self.arrival_s + _PATIENCE * left / tokens_per_s

    def add(self, sequences: Sequence[Ids]) -> None:
        """Tokenised pairs, those after what is there."""
        places = range(self.tokenised, self.tokenised + len(sequences))
        self.tokens[self.tokenised : places.stop] = [len(each) for each in sequences]
        self.waiting = sorted([*self.waiting, *zip(sequences, places, strict=True)], key=lambda each: len(each[0]))
        self.lengths = [len(ids) for ids, _ in self.waiting]
        self.waiting_tokens += sum(len(each) for each in sequences)
        self.tokenised = places.stop

    def take(self, at: int) -> "tuple[_Request, Ids, int]":
        """Removes one that waits: itself, the pair's ids and its place."""
        self.waiting_tokens -= self.lengths.pop(at)
        return self, *self.waiting.pop(at)


_Chosen = list[tuple[_Request, Ids, int]]


class Batcher:
    """Feeds one engine from many requests. Safe to use from several threads.

    Args:
        tokenizer: of the pairs.
        score: scores a batch, float32 [pairs]; called from `limits.concurrency` threads.
        limits: how the engine wants to be fed.
        pad_token_id: for the batches.
        max_length: tokens that pairs are truncated to.
        max_waiting_pairs: no request is accepted while more are waiting.
    """

    def __init__(
        self,
        tokenizer: PairTokenizer,
        score: Callable[[Batch], NDArray[np.float32]],
        limits: Limits,
        pad_token_id: int,
        max_length: int,
        max_waiting_pairs: int = 8192,
    ) -> None:
        self._tokenizer, self._score, self._limits, self._pad_token_id = tokenizer, score, limits, pad_token_id
        self.max_length, self.max_waiting_pairs = max_length, max_waiting_pairs
        self._changed = threading.Condition()
        self._requests: list[_Request] = []
        self._waiting_pairs = 0  # not scored yet
        self._closing = False
        self._tokens_per_s = _FIRST_SPEED
        self.batches = self.pairs = self.tokens = 0  # scored so far
        self._threads = [threading.Thread(target=self._tokenise, name="ettin-tokenise", daemon=True)]
        for number in range(limits.concurrency):
            self._threads.append(threading.Thread(target=self._work, name=f"ettin-score-{number}", daemon=True))
        for thread in self._threads:
            thread.start()

    @classmethod
    def of(cls, runtime: Runtime, max_waiting_pairs: int = 8192) -> Self:
        """For a loaded artifact."""
        pad = runtime.manifest.tokenizer.pad_token_id
        return cls(runtime.tokenizer, runtime.score, runtime.limits, pad, runtime.max_length, max_waiting_pairs)

    @property
    def waiting_pairs(self) -> int:
        """Accepted and not scored yet."""
        return self._waiting_pairs

    @property
    def queue_s(self) -> float:
        """Seconds that what waits will take, at the measured speed."""
        mean = self.tokens / self.pairs if self.pairs else 128
        return self._waiting_pairs * mean / self._tokens_per_s

    def submit(
        self, pairs: Sequence[Pair], is_cancelled: Callable[[], bool] = lambda: False, *, wait: bool = False
    ) -> "Future[Scored]":
        """Accepts a request.

        Args:
            pairs: (query, document).
            is_cancelled: whether nobody wants the result any more; asked before each of its batches. Cancelling the
                future has the same effect.
            wait: for room, if there is none.

        Returns:
            Its result: fails with InputError for a text that is not valid Unicode, and with whatever the engine
            raised for a batch of this request alone.

        Raises:
            Busy: no room, or closing.
        """
        with self._changed:
            while not self._closing and self._waiting_pairs >= self.max_waiting_pairs and wait:
                self._changed.wait()
            if self._closing:
                raise Busy("the server is stopping", 5.0, is_stopping=True)
            if self._waiting_pairs >= self.max_waiting_pairs:
                raise Busy(f"{self._waiting_pairs} pairs are waiting, limit {self.max_waiting_pairs}", self.queue_s)
            request = _Request(pairs, time.monotonic(), is_cancelled)
            if not pairs:
                request.future.set_result(Scored(request.logits, request.tokens))
                return request.future
            self._requests.append(request)
            self._waiting_pairs += len(pairs)
            self._changed.notify_all()
        return request.future

    def close(self, timeout_s: float = 30.0) -> None:
        """Accepts nothing more, finishes what it has; what is not done in time fails."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._requests and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())
            left = [*self._requests]
        for request in left:
            self._end(request, Busy("the server stopped before this was scored", 5.0, is_stopping=True))
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()) + 1)

    def _next(self, has_work: Callable[[_Request], object]) -> _Request | None:
        """Waits for a request that has such work; None: all is done. Called with the lock held."""
        while not (ready := [each for each in self._requests if has_work(each)]):
            if self._closing and not self._requests:
                return None
            self._changed.wait()
        return min(ready, key=self._due_s)

    def _due_s(self, request: _Request) -> float:
        return request.due_s(self._tokens_per_s)

    def _tokenise(self) -> None:
        while True:
            with self._changed:
                request = self._next(lambda each: each.tokenised < len(each.pairs))
            if request is None:
                return
            if request.is_unwanted():
                self._end(request, None)
                continue
            part = request.pairs[request.tokenised : request.tokenised + _SLICE_PAIRS]
            try:
                sequences = self._tokenizer.pairs(part, self.max_length)
            except Exception as error:
                self._end(request, error)
                continue
            with self._changed:
                request.add(sequences)
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                first = self._next(lambda each: each.waiting)
                if first is None:
                    return
                chosen = self._chosen(first)
            unwanted = {id(each): each for each, _, _ in chosen if each.is_unwanted()}
            for request in unwanted.values():
                self._end(request, None)
            wanted = [each for each in chosen if id(each[0]) not in unwanted]
            if wanted:
                self._score_chosen(wanted)

    def _chosen(self, first: _Request) -> _Chosen:
        """The next batch: the longest pair of `first`, and the longest that fit beside it, of all that wait."""
        limits = self._limits
        width = round_up(first.lengths[-1], limits.length_multiple)
        chosen = [first.take(len(first.lengths) - 1)]
        budget = limits.batch_tokens
        if limits.in_parallel:  # little work is divided among the streams
            budget = min(budget, -(-sum(each.waiting_tokens for each in self._requests) // limits.concurrency))
        count = min(max(1, budget // width), limits.batch_pairs or budget) - 1
        offers: list[tuple[int, int, _Request]] = []
        for request in sorted(self._requests, key=self._due_s):
            end = bisect_right(request.lengths, width)
            offers += [(request.lengths[at], at, request) for at in range(max(0, end - count), end)]
            if len(offers) >= _CHOICE * count:
                break
        best = sorted(offers, key=lambda each: -each[0])[:count]
        # From each request's end, so that places stay what they are.
        return chosen + [request.take(at) for _, at, request in sorted(best, key=lambda each: -each[1])]

    def _score_chosen(self, chosen: _Chosen) -> None:
        started = time.monotonic()
        batch = Batch.of([ids for _, ids, _ in chosen], self._pad_token_id)
        try:
            scores = self._score(batch)
        except Exception as error:
            whose = {id(request): request for request, _, _ in chosen}
            if len(whose) == 1:
                self._end(chosen[0][0], error)
                return
            for each in whose:
                self._score_chosen([one for one in chosen if id(one[0]) == each])
            return
        seconds = max(time.monotonic() - started, 1e-6)
        speed = len(batch.ids) / seconds * (self._limits.concurrency if self._limits.in_parallel else 1)
        with self._changed:
            self._tokens_per_s += 0.05 * (speed - self._tokens_per_s)
            self.batches += 1
            self.pairs += len(batch)
            self.tokens += len(batch.ids)
            for (request, _, place), score in zip(chosen, scores.tolist(), strict=True):
                request.logits[place] = score
                request.done += 1
                self._waiting_pairs -= request in self._requests
            finished = {id(each): each for each, _, _ in chosen if each.done == len(each.pairs)}
            self._changed.notify_all()
        for request in finished.values():
            self._end(request, None)

    def _end(self, request: _Request, error: Exception | None) -> None:
        """The request is over: done, failed or unwanted. Whoever waits for it is called without the lock."""
        with self._changed:
            if request not in self._requests:
                return
            self._requests.remove(request)
            self._waiting_pairs -= len(request.pairs) - request.done
            self._changed.notify_all()
        with suppress(InvalidStateError):  # cancelled
            if error is not None:
                request.future.set_exception(error)
            elif request.done == len(request.pairs):
                request.future.set_result(Scored(request.logits, request.tokens))
            else:
                request.future.cancel()
