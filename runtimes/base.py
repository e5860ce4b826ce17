"""What every runtime shares: tokenising, sorting, batching by token budget, ordering, progress."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ettin.artifacts.errors import EttinError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes.activation import resolved
from ettin.runtimes.batch import Batch, Ids, cut
from ettin.runtimes.inputs import Pair, documents_from_input, pairs_from_inputs, text
from ettin.runtimes.tokenizer import PairTokenizer

_WINDOW_PAIRS = 2048  # tokenised and sorted together, while the window before is scored


@dataclass(frozen=True)
class Limits:
    """How a backend wants to be fed.

    Args:
        concurrency: calls of `score` that make progress at the same time.
        batch_tokens: token budget of a batch, padding included.
        length_multiple: lengths are rounded up to this.
    """

    concurrency: int
    batch_tokens: int
    length_multiple: int = 1


@dataclass(frozen=True)
class Settings:
    """What a user chooses at load.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads; None: `cpu.available_cpus`.
        streams: batches scored at the same time, among which threads are divided; None: the backend's best for many
            pairs.
        cache_dir: where the engine may keep its compiled form; None: nowhere.
        max_length: tokens that pairs are truncated to; None: the artifact's.
    """

    device: str = "cpu"
    threads: int | None = None
    streams: int | None = None
    cache_dir: Path | None = None
    max_length: int | None = None

    def refuse(self, target: str, *names: str) -> None:
        """For a backend that has no use for some settings.

        Raises:
            UsageError: one of `names` was set.
        """
        for name in names:
            if getattr(self, name) is not None:
                where = f"target '{target}' on device '{self.device}'"
                raise UsageError(f"{name}: {where} has no such setting. Leave it out")


class Runtime(ABC):
    """A loaded artifact. Safe to use from several threads; close it or use it as a context manager.

    Args:
        folder: the artifact.
        manifest: its manifest, checked.
        settings: the user's.
        limits: how the backend wants to be fed.

    Raises:
        UsageError: max_length is not between the special tokens and what the artifact was made for.
    """

    def __init__(self, folder: Path, manifest: Manifest, settings: Settings, limits: Limits) -> None:
        self.folder, self.manifest, self.limits = folder, manifest, limits
        self.tokenizer = PairTokenizer(folder / "tokenizer.json")
        self.max_length = self._checked_length(settings.max_length)
        self._workers = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="ettin-score")
        self._closed = False

    @abstractmethod
    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Score tokenised query–document pairs. Re-entrant.

        Args:
            batch: ids int32 [tokens], cu_seqlens int32 [pairs + 1]; batch.padded(multiple)
                gives input_ids, attention_mask int64 [pairs, longest].

        Returns:
            Raw logits, float32 [pairs]; higher is more relevant, no sigmoid.

        Raises:
            ShapeError: pairs or tokens exceed what the artifact was built for.
        """

    @property
    @abstractmethod
    def description(self) -> str:
        """Engine, device and precision that really run, in a few words."""

    @property
    @abstractmethod
    def arithmetic(self) -> str:
        """Type that the engine computes in: "f32", "bf16", "f16"."""

    def predict(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        max_length: int | None = None,
    ) -> Any:
        """Scores pairs, as `CrossEncoder.predict` does.

        Args:
            inputs: (query, document) pairs in any iterable, or one pair.
            batch_size: pairs in a batch, at most; batches are cut by token budget first. None: budget alone.
            show_progress_bar: a bar on stderr.
            activation_fn: None (the artifact's own: raw logits), "identity", "sigmoid", or a function of a
                float32 array.
            apply_softmax: accepted for CrossEncoder's callers; without effect on a single logit, as there.
            convert_to_numpy: accepted likewise; scores are NumPy either way.
            convert_to_tensor: must be False: no torch here. Use `torch.from_numpy`.
            max_length: tokens that pairs are truncated to (`longest_first`); None: as loaded.

        Returns:
            float32 [pairs] in the order of the pairs; a float32 scalar for one pair.

        Raises:
            InputError: something that is not a pair of strings.
            UsageError: an argument out of its range.
        """
        if convert_to_tensor:
            raise UsageError("convert_to_tensor: scores are NumPy arrays here. Use torch.from_numpy(scores)")
        if batch_size is not None and batch_size <= 0:
            raise UsageError(f"batch_size is {batch_size}, expected a positive number")
        activation = resolved(activation_fn, self.manifest.activation)
        length = self.max_length if max_length is None else self._checked_length(max_length)
        pairs, single = pairs_from_inputs(inputs)
        logits = self._logits(pairs, length, batch_size, bool(show_progress_bar))
        scores = activation(logits)
        if scores.shape != logits.shape:
            raise UsageError(f"activation_fn turned scores {logits.shape} into {scores.shape}, expected the same shape")
        return scores[0] if single else scores

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        max_length: int | None = None,
    ) -> list[dict[str, Any]]:
        """Ranks documents for a query, as `CrossEncoder.rank` does.

        Args:
            query: the query.
            documents: the documents, in any iterable.
            top_k: results returned, at most; None: all.
            return_documents: also return each document, as "text".
            batch_size: see `predict`.
            show_progress_bar: see `predict`.
            activation_fn: see `predict`.
            max_length: see `predict`.

        Returns:
            Best first; each {"corpus_id": position in `documents`, "score": float} and "text" if asked for.
            Equal scores keep the order of the documents.

        Raises:
            InputError: the query or a document is not a string.
            UsageError: an argument out of its range.
        """
        if top_k is not None and top_k < 0:
            raise UsageError(f"top_k is {top_k}, expected 0 or more")
        query, candidates = text(query, "query"), documents_from_input(documents)
        scores = self.predict(
            [(query, document) for document in candidates],
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            max_length=max_length,
        ).tolist()
        order = sorted(range(len(scores)), key=lambda at: scores[at], reverse=True)[:top_k]
        hits: list[dict[str, Any]] = [{"corpus_id": at, "score": scores[at]} for at in order]
        if return_documents:
            for hit in hits:
                hit["text"] = candidates[hit["corpus_id"]]
        return hits

    def close(self) -> None:
        """Frees the engine. Using the runtime afterwards is an error; closing twice is not."""
        if not self._closed:
            self._closed = True
            self._workers.shutdown(wait=True, cancel_futures=True)
            self._release()

    def _release(self) -> None:  # noqa: B027 (nothing to free is fine)
        """Frees what the backend holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        made = self.manifest
        return f"<{type(self).__name__} {made.name}/{made.target}-{made.precision}: {self.description}>"

    def _checked_length(self, max_length: int | None) -> int:
        most = self.manifest.max_length_tokens
        if max_length is None:
            return most
        if not isinstance(max_length, int) or not 3 <= max_length <= most:
            raise UsageError(
                f"max_length is {max_length}, expected 3 to {most} tokens (what the artifact was made for)"
            )
        return max_length

    def _logits(
        self, pairs: Sequence[Pair], max_length: int, batch_size: int | None, progress: bool
    ) -> NDArray[np.float32]:
        if self._closed:
            raise EttinError(f"{self.folder}: this runtime is closed. Load it again")
        logits = np.empty(len(pairs), np.float32)
        with tqdm(total=len(pairs), desc="Scoring pairs", unit="pairs", disable=not progress) as bar:
            pending: list[Future[int]] = []
            try:
                for window in _windows(len(pairs)):
                    tokenised = self.tokenizer.pairs(pairs[window.start : window.stop], max_length)
                    _drain(pending)
                    for batch in self._batches(tokenised, batch_size):
                        future = self._workers.submit(self._score_into, logits, tokenised, batch, window.start)
                        if progress:
                            future.add_done_callback(lambda done: bar.update(_pairs_done(done)))
                        pending.append(future)
                _drain(pending)
            finally:
                for future in pending:
                    future.cancel()
        return logits

    def _batches(self, tokenised: Sequence[Ids], batch_size: int | None) -> Iterator[list[int]]:
        limits = self.limits
        lengths = [len(ids) for ids in tokenised]
        # No batch larger than a fair share of the work, or streams would idle.
        share = -(-sum(lengths) // limits.concurrency)
        budget = max(1, min(limits.batch_tokens, share))
        return cut(lengths, budget, limits.length_multiple, batch_size)

    def _score_into(self, logits: NDArray[np.float32], tokenised: Sequence[Ids], batch: list[int], offset: int) -> int:
        sequences = [tokenised[at] for at in batch]
        scores = self.score(Batch.of(sequences, self.manifest.tokenizer.pad_token_id))
        logits[[offset + at for at in batch]] = scores
        return len(batch)


def _windows(count: int) -> Iterator[range]:
    for start in range(0, count, _WINDOW_PAIRS):
        yield range(start, min(start + _WINDOW_PAIRS, count))


def _drain(pending: list[Future[int]]) -> None:
    """Waits for all; the first error is raised at once."""
    done, _ = wait(pending, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    pending.clear()


def _pairs_done(future: Future[int]) -> int:
    return 0 if future.cancelled() or future.exception() else future.result()
