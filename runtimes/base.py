"""The base of all runtimes: CrossEncoder's interface over an engine that scores batches."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import UsageError
from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes import processes
from ettin.runtimes.arguments import (
    Activation,
    Pair,
    checked_length,
    documents_from_input,
    pairs_from_inputs,
    resolved,
    text,
)
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.long_documents import LongDocuments
from ettin.runtimes.request import Request, Scored
from ettin.runtimes.scheduler import Scheduler
from ettin.runtimes.tokenizer import artifact_tokenizer

_LOG = logging.getLogger("ettin.predict")


@dataclass(frozen=True)
class Settings:
    """The user's choices; see `load`."""

    device: str = "cpu"
    threads: int | None = None
    streams: int | None = None
    cache_dir: Path | None = None
    max_length: int | None = None
    batch_tokens: int | None = None
    allow_unverified: bool = False
    precision: str | None = None

    def refuse(self, target: str, *names: str) -> None:
        """Raises `UsageError` if a setting is given that the engine does not have."""
        for name in names:
            if getattr(self, name) is not None:
                where = f"target '{target}' on device '{self.device}'"
                raise UsageError(f"{name}: {where} has no such setting. Leave it out")


class Evaluations:
    """Results of sentence-transformers' evaluators, by the evaluator's name: metric → value."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, Any]] = {}

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Called by an evaluator with its results."""
        self.metrics[evaluator.name] = dict(metrics)


class Runtime(ABC):
    """A loaded artifact. Safe to use from several threads; close it or use it as a context manager.

    Args:
        artifact: open; nothing is read from it afterwards.
        settings: the user's choices.
        limits: the batches that the engine takes.

    Raises:
        DamagedArtifact: the tokenizer is damaged, or is not the model's.
        UsageError: max_length is not between the special tokens and what the artifact was made for.
    """

    reload: "Callable[[str, Settings, str], Runtime] | None" = None  # set by what loaded it; makes it picklable

    def __init__(self, artifact: OpenArtifact, settings: Settings, limits: BatchLimits) -> None:
        if settings.batch_tokens is not None:
            limits = replace(limits, batch_tokens=settings.batch_tokens)
        self.folder, self.manifest = artifact.path, artifact.manifest
        self.settings, self.limits = settings, limits
        self.tokenizer = artifact_tokenizer(artifact)
        self.max_length = checked_length(settings.max_length, self.manifest)
        self.scheduler = Scheduler(self.tokenizer, self.score, limits, self.manifest.tokenizer.pad_token_id)
        self._is_released = self._has_warned = False
        self.evaluations = Evaluations()
        processes.keep_in_children(self)

    @abstractmethod
    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Scores tokenised pairs. Re-entrant.

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
        """Engine, device and precision that run, in a few words."""

    @property
    @abstractmethod
    def arithmetic(self) -> Arithmetic:
        """What the engine computes in."""

    @property
    def unproven_arithmetic(self) -> Arithmetic | None:
        """What this machine would rather compute in, but was not proven for this artifact; None: nothing."""
        return None

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
        prompt_name: str | None = None,
        prompt: str | None = None,
        long_documents: LongDocuments | str | None = None,
    ) -> Any:
        """Scores pairs, as `CrossEncoder.predict` does. Logs a warning, once, if `max_length` as loaded cuts some.

        Args:
            inputs: (query, document) pairs in any iterable, or one pair.
            batch_size: maximum number of pairs in a batch; None: the token budget alone limits it.
            show_progress_bar: show a progress bar on stderr.
            activation_fn: None (the checkpoint's own; Ettin has none, so raw logits), "identity" (raw logits),
                "sigmoid", "calibrated" (the probability of relevance, see `ettin-calibrate`), or a function of a
                float32 array.
            apply_softmax: accepted for CrossEncoder's callers; no effect on a single logit, as there.
            convert_to_numpy: accepted for CrossEncoder's callers; scores are NumPy arrays either way.
            convert_to_tensor: must be False, since this package does not import torch. Use `torch.from_numpy`.
            max_length: tokens that pairs are truncated to (`longest_first`); None: as loaded.
            prompt_name: must be None: these models have no prompts.
            prompt: must be None.
            long_documents: what happens to documents that do not fit: "truncate" (None), "chunks", or `LongDocuments`
                with all details.

        Returns:
            float32 [pairs] in the order of the pairs; a float32 scalar for one pair.

        Raises:
            InputError: something that is not a pair of strings.
            UsageError: an argument out of its range.
        """
        if convert_to_tensor:
            raise UsageError("convert_to_tensor: scores are NumPy arrays here. Use torch.from_numpy(scores)")
        if prompt_name is not None or prompt is not None:
            raise UsageError("prompt: Ettin rerankers have none. Write it into the query")
        pairs, single = pairs_from_inputs(inputs)
        scored, activation = self._scored(
            pairs, batch_size, show_progress_bar, activation_fn, max_length, long_documents
        )
        scores = activation(scored.logits)
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
        long_documents: LongDocuments | str | None = None,
    ) -> list[dict[str, Any]]:
        """Ranks documents for a query, as `CrossEncoder.rank` does.

        Args:
            query: the query.
            documents: the documents, in any iterable.
            top_k: maximum number of results; None: all.
            return_documents: also return each document, as "text".
            batch_size: see `predict`.
            show_progress_bar: see `predict`.
            activation_fn: see `predict`.
            max_length: see `predict`.
            long_documents: see `predict`.

        Returns:
            Best first, by logit whatever the activation; each {"corpus_id": position in `documents`, "score": float},
            "text" if asked for, and "truncated": True if not all of the query and the document was scored. Equal
            scores keep the order of the documents.

        Raises:
            InputError: the query or a document is not a string.
            UsageError: an argument out of its range.
        """
        if top_k is not None and top_k < 0:
            raise UsageError(f"top_k is {top_k}, expected 0 or more")
        query, candidates = text(query, "query"), documents_from_input(documents)
        pairs = [(query, document) for document in candidates]
        scored, activation = self._scored(
            pairs, batch_size, show_progress_bar, activation_fn, max_length, long_documents
        )
        scores = activation(scored.logits).tolist()
        # By logit: a sigmoid in float32 makes those above 16.6 equal.
        order = np.argsort(-scored.logits, kind="stable")[:top_k].tolist()
        hits: list[dict[str, Any]] = [{"corpus_id": index, "score": scores[index]} for index in order]
        for hit in hits:
            if scored.truncated[hit["corpus_id"]]:
                hit["truncated"] = True
        if return_documents:
            for hit in hits:
                hit["text"] = candidates[hit["corpus_id"]]
        return hits

    def _scored(
        self,
        pairs: list[Pair],
        batch_size: int | None,
        progress: bool | None,
        activation_fn: Any,
        max_length: int | None,
        long_documents: LongDocuments | str | None,
    ) -> tuple[Scored, Activation]:
        """Raw logits of checked pairs, and the function that the caller wants applied to them."""
        if batch_size is not None and batch_size <= 0:
            raise UsageError(f"batch_size is {batch_size}, expected a positive number")
        activation = resolved(activation_fn, self.manifest)
        length = self.max_length if max_length is None else checked_length(max_length, self.manifest)
        request = Request(pairs, length, batch_pairs=batch_size, long_documents=LongDocuments.of(long_documents))
        scored = self.scheduler.scored(request, bool(progress))
        if max_length is None and scored.truncated.any() and not self._has_warned:
            self._has_warned = True
            _LOG.warning(
                "%d of %d pairs were truncated (max_length %d tokens); long_documents='chunks' scores whole documents. "
                "rank() marks them as truncated; this is said once",
                scored.truncated.sum(), len(pairs), length,
            )  # fmt: skip
        return scored, activation

    @property
    def model_card_data(self) -> "Evaluations":
        """The object that sentence-transformers' evaluators give their results to."""
        return self.evaluations

    def close(self) -> None:
        """Releases the engine; requests of other threads fail with `Closed`. Closing twice is no error."""
        is_idle = self.scheduler.close(f"{self.folder}: this runtime is closed. Load it again")
        if is_idle and not self._is_released:
            self._is_released = True
            self._release()

    def _release(self) -> None:  # noqa: B027 (nothing to free is fine)
        """Releases the engine; called once, when no batch is being scored."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path of the artifact and the settings: the runtime is loaded again where it is unpickled."""
        if self.reload is None:
            raise TypeError(f"{self!r} was not made by `load`, so it can't be pickled")
        return self.reload, (str(self.folder.absolute()), self.settings, self.manifest.digest)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.manifest.full_name}: {self.description}>"
