"""A caller's pairs on their way through the scheduler."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.errors import EttinError, Expired, InputError, ScoringError
from ettin.runtimes.arguments import Pair
from ettin.runtimes.batch import Ids
from ettin.runtimes.long_documents import LongDocuments, combined
from ettin.runtimes.processes import PAUSE_S
from ettin.runtimes.score_cache import ScoreCache
from ettin.runtimes.tokenizer import CHARACTERS_PER_TOKEN, Encoded

_PATIENCE = 64
_ENGLISH_CHARACTERS_PER_TOKEN = 4  # estimates the work of a request
# Tokenised pairs of one request that may wait: enough for batches of similar lengths.
_AHEAD_PAIRS = 2048
_AHEAD_TOKENS = 1 << 20
# Pairs and characters that are tokenised at a time, so that a large request does not keep others waiting. A million
# characters take about 80 MiB meanwhile.
_SLICE_PAIRS = 128
_SLICE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Scored:
    """The result of a request, in the order of its pairs."""

    logits: NDArray[np.float32]  # raw, [pairs]
    tokens: NDArray[np.int32]  # number of tokens of each pair, as scored, in all its chunks
    truncated: NDArray[np.bool_]  # whether some of a pair's tokens were not scored
    queue_s: float | None = None  # from its arrival to its first batch; None: not known here
    engine_s: float | None = None  # time of all batches that had pairs of it, which may overlap


class Request:
    """Pairs, and their scores so far. The scheduler's lock guards everything that changes.

    Args:
        pairs: (query, document).
        max_length: tokens that pairs are truncated to.
        is_cancelled: says whether the caller does not want the result any more.
        timeout_s: seconds until the request expires; None: never.
        batch_pairs: maximum number of pairs in a batch; None: no limit.
        refuse_truncated: fail if a pair would be truncated, before any is scored.
        long_documents: what happens to documents that do not fit.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        max_length: int,
        is_cancelled: Callable[[], bool] = lambda: False,
        timeout_s: float | None = None,
        *,
        batch_pairs: int | None = None,
        refuse_truncated: bool = False,
        long_documents: LongDocuments | None = None,
    ) -> None:
        self.pairs, self.max_length, self.batch_pairs = pairs, max_length, batch_pairs
        self.caller_tokenises, self._refuse_truncated = False, refuse_truncated
        self._is_cancelled, self._timeout_s = is_cancelled, timeout_s
        self.future: Future[Scored] = Future()
        self.arrival_s = time.monotonic()
        self.deadline_s = self.arrival_s + (float("inf") if timeout_s is None else timeout_s)
        self.long_documents = long_documents or LongDocuments()
        self._most_tokens = float("inf") if self.long_documents.has_chunks else max_length  # of a text
        self._work_tokens = sum(
            min((len(query) + len(document)) / _ENGLISH_CHARACTERS_PER_TOKEN, self._most_tokens)
            for query, document in pairs
        )
        # By chunk: the first of each pair, then further ones as they are tokenised.
        self.logits = np.empty(len(pairs), np.float32)
        self._owners = list(range(len(pairs)))
        self.tokens = np.empty(len(pairs), np.int32)
        self._truncated = np.empty(len(pairs), np.bool_)
        self._taken = self._tokenised = 0  # pairs that a thread took to tokenise them, and gave back
        # Tokenised pairs that wait for the engine, shortest first: their lengths, and their ids and places.
        self.lengths: list[int] = []
        self._waiting: list[tuple[Ids, int]] = []
        self.waiting_tokens = 0
        self.done = 0
        self._queue_s, self._engine_s = float("inf"), 0.0

    def is_unwanted(self) -> bool:
        """Whether nobody waits for the result. Do not call it under a lock: another process may have to answer."""
        return self.future.cancelled() or self._is_cancelled()

    def due_s(self, tokens_per_s: float) -> float:
        """Monotonic time at which the request should be done, see `scheduler`."""
        left = self._work_tokens * (1 - self.done / max(1, self.chunks))
        return self.arrival_s + _PATIENCE * left / tokens_per_s

    @property
    def chunks(self) -> int:
        """Number of chunks, one for each pair that is not tokenised yet: what the engine has to score."""
        return len(self._owners)

    @property
    def has_untokenised(self) -> bool:
        """Whether pairs are left to tokenise."""
        return self._taken < len(self.pairs)

    @property
    def has_room(self) -> bool:
        """Whether the next pairs should be tokenised now."""
        is_ahead = len(self._waiting) >= _AHEAD_PAIRS or self.waiting_tokens >= _AHEAD_TOKENS
        return self.has_untokenised and (self._refuse_truncated or not is_ahead)

    @property
    def has_pairs(self) -> bool:
        """Whether pairs wait for the engine."""
        return bool(self._waiting) and (not self._refuse_truncated or self._tokenised == len(self.pairs))

    @property
    def is_done(self) -> bool:
        """Whether all pairs are scored."""
        return not self.left

    @property
    def left(self) -> int:
        """Number of chunks that are not scored yet."""
        return self.chunks - self.done

    def take_slice(self) -> range | None:
        """Takes the indices of the pairs that are tokenised next; None: there are no more."""
        start, characters = self._taken, 0
        while self._taken < min(start + _SLICE_PAIRS, len(self.pairs)) and characters < _SLICE_CHARACTERS:
            characters += sum(
                int(min(len(text), CHARACTERS_PER_TOKEN * self._most_tokens)) for text in self.pairs[self._taken]
            )
            self._taken += 1
        return range(start, self._taken) if self._taken > start else None

    def check(self, encoded: Sequence[Encoded], part: range) -> None:
        """Raises `InputError` if a pair of `part` is truncated and must not be."""
        most = self.long_documents.max_tokens_per_doc
        for (_, is_truncated), index in zip(encoded, part, strict=True):
            if self._refuse_truncated and is_truncated:
                limits = f"has, with its query, more than {self.max_length} tokens"
                if most is not None:
                    limits = f"has more than {most} tokens, or with its query more than {self.max_length}"
                raise InputError(
                    f"document {index} {limits}, and truncation was refused. Shorten it, or allow truncation"
                )

    def add(self, encoded: Sequence[Encoded], part: range, cache: ScoreCache) -> None:
        """Adds tokenised pairs, whose indices are `part`; those that are in the cache are done."""
        first, further = len(self._waiting), sum(len(chunks) - 1 for chunks, _ in encoded)
        self.logits = np.append(self.logits, np.empty(further, np.float32)) if further else self.logits
        for index, (chunks, is_truncated) in zip(part, encoded, strict=True):
            self.tokens[index], self._truncated[index] = sum(map(len, chunks)), is_truncated
            places = [index, *range(self.chunks, self.chunks + len(chunks) - 1)]
            self._owners += [index] * (len(chunks) - 1)
            for ids, place in zip(chunks, places, strict=True):
                score = cache.get(ids)
                if score is None:
                    self._waiting.append((ids, place))
                else:
                    self.finish(place, score)
        self.waiting_tokens += sum(len(ids) for ids, _ in self._waiting[first:])
        self._waiting.sort(key=lambda chunk: len(chunk[0]))
        self.lengths = [len(ids) for ids, _ in self._waiting]
        self._tokenised += len(part)

    def finish(self, place: int, score: float) -> None:
        """Notes the score of the chunk at a place."""
        self.logits[place] = score
        self.done += 1

    def note_batch(self, started_s: float, engine_s: float) -> None:
        """Notes that the engine scored a batch with chunks of this request."""
        self._queue_s = min(self._queue_s, started_s - self.arrival_s)
        self._engine_s += engine_s

    def take(self, index: int) -> "tuple[Request, Ids, int]":
        """Takes a pair that waits: this request, the pair's ids and its place in the request."""
        self.waiting_tokens -= self.lengths.pop(index)
        return self, *self._waiting.pop(index)

    def succeed(self) -> None:
        """Gives the caller the scores."""
        logits = self.logits
        if self.chunks > len(self.pairs):
            logits = combined(logits, np.array(self._owners), self.long_documents.top_chunks)
        queue_s = min(self._queue_s, time.monotonic() - self.arrival_s)
        self.future.set_result(Scored(logits, self.tokens, self._truncated, queue_s, self._engine_s))

    def expired(self) -> Expired:
        """The error of a request that has expired."""
        done = f"{self.done} of {self.chunks} pairs were scored"
        return Expired(f"the request was not done after {self._timeout_s:g} s: {done}")


@contextmanager
def failing(end: Callable[[Request, EttinError], None], requests: Callable[[], Sequence[Request]]) -> Iterator[None]:
    """Fails `requests` with whatever the block raises, `MemoryError`, a panic in Rust and `SystemExit` included."""
    try:
        yield
    except BaseException as error:
        failure = error if isinstance(error, EttinError) else ScoringError.caused_by(error)
        affected = requests()
        for request in affected:
            end(request, failure)
        if not affected:
            time.sleep(PAUSE_S)
