"""Pairs → batches → scores: tokenising ahead of the engine, batches of like lengths, results in order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ettin.runtimes.batch import Batch, Ids, cut
from ettin.runtimes.inputs import Pair
from ettin.runtimes.tokenizer import PairTokenizer

_WINDOW_PAIRS = 2048  # tokenised and sorted together, while the windows before are scored
_FIRST_WINDOW_PAIRS = 256  # … on one fast device, which waits for the first; then twice as many each time


@dataclass(frozen=True)
class Limits:
    """How a backend wants to be fed.

    Args:
        concurrency: calls of `score` that make progress at the same time.
        batch_tokens: token budget of a batch, padding included.
        length_multiple: lengths are rounded up to this.
        batch_pairs: pairs in a batch, at most; None: the budget alone.
        in_parallel: whether concurrent calls compute at the same time, so that little work is divided among them;
            False: they take turns on one device.
    """

    concurrency: int
    batch_tokens: int
    length_multiple: int = 1
    batch_pairs: int | None = None
    in_parallel: bool = True


class Feeder:
    """Feeds one engine. Safe to use from several threads.

    Args:
        tokenizer: of the pairs.
        score: scores a batch, float32 [pairs]; called from `limits.concurrency` threads.
        limits: how the engine wants to be fed.
        pad_token_id: for the batches.
    """

    def __init__(
        self,
        tokenizer: PairTokenizer,
        score: Callable[[Batch], NDArray[np.float32]],
        limits: Limits,
        pad_token_id: int,
    ) -> None:
        self._tokenizer, self._score, self._limits, self._pad_token_id = tokenizer, score, limits, pad_token_id
        self._workers = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="ettin-score")

    def logits(
        self, pairs: Sequence[Pair], max_length: int, batch_size: int | None, progress: bool
    ) -> NDArray[np.float32]:
        """Raw logits, float32 [pairs], in the order of the pairs.

        Args:
            pairs: what is scored.
            max_length: tokens that pairs are truncated to.
            batch_size: pairs in a batch, at most; None: the limits alone.
            progress: a bar on stderr.
        """
        logits = np.empty(len(pairs), np.float32)
        with tqdm(total=len(pairs), desc="Scoring pairs", unit="pairs", disable=not progress) as bar:
            pending: list[Future[int]] = []
            try:
                for window in _windows(len(pairs), _WINDOW_PAIRS if self._limits.in_parallel else _FIRST_WINDOW_PAIRS):
                    tokenised = self._tokenizer.pairs(pairs[window.start : window.stop], max_length)
                    before = len(pending)
                    for batch in self._batches(tokenised, batch_size):
                        future = self._workers.submit(self._score_into, logits, tokenised, batch, window.start)
                        if progress:
                            future.add_done_callback(lambda done: bar.update(_pairs_done(done)))
                        pending.append(future)
                    # The window before must be done; this one is queued already, so nothing idles meanwhile.
                    _drain(pending[:before])
                    del pending[:before]
                _drain(pending)
            finally:
                for future in pending:
                    future.cancel()
        return logits

    def _batches(self, tokenised: Sequence[Ids], batch_size: int | None) -> Iterator[list[int]]:
        limits = self._limits
        lengths = [len(ids) for ids in tokenised]
        budget = limits.batch_tokens
        if limits.in_parallel:  # no batch larger than a fair share of the work, or streams would idle
            budget = max(1, min(budget, -(-sum(lengths) // limits.concurrency)))
        most = min((each for each in (batch_size, limits.batch_pairs) if each is not None), default=None)
        return cut(lengths, budget, limits.length_multiple, most)

    def _score_into(self, logits: NDArray[np.float32], tokenised: Sequence[Ids], batch: list[int], offset: int) -> int:
        sequences = [tokenised[at] for at in batch]
        scores = self._score(Batch.of(sequences, self._pad_token_id))
        logits[[offset + at for at in batch]] = scores
        return len(batch)

    def close(self) -> None:
        """Waits for what is being scored; the rest is dropped."""
        self._workers.shutdown(wait=True, cancel_futures=True)


def _windows(count: int, first: int) -> Iterator[range]:
    start, size = 0, first
    while start < count:
        yield range(start, min(start + size, count))
        start, size = start + size, min(2 * size, _WINDOW_PAIRS)


def _drain(pending: list[Future[int]]) -> None:
    """Waits for all; the first error is raised at once."""
    done, _ = wait(pending, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


def _pairs_done(future: Future[int]) -> int:
    return 0 if future.cancelled() or future.exception() else future.result()
