"""Backends of the HTTP routes: an artifact in this process, or a model in a Triton server."""

import asyncio
import json
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ettin.artifacts.errors import Busy, EttinError, InputError, MissingDependency, ServerError, UsageError
from ettin.artifacts.score_calibration import ScoreCalibration
from ettin.runtimes.base import Runtime
from ettin.runtimes.batch import Batch
from ettin.runtimes.long_documents import LongDocuments
from ettin.runtimes.request import Request, Scored
from ettin.runtimes.score_cache import ScoreCache
from ettin.runtimes.serving.limits import Limits

_LOG = logging.getLogger("ettin.serve")
REFUSE_TRUNCATED = "refuse_truncated"  # a parameter of requests to Triton
_ASK_EVERY_S = 5.0  # whether a version's configuration has changed in place
_ANSWER_S = 5.0  # time limit for what Triton answers about its models
DRAIN_S = 30.0  # that pending requests are given when a server stops
# Scored once before a server is ready: a short pair and a long one.
WARMUP_QUERY = "what is warmed up"
WARMUP_DOCUMENTS = ("the model", "its kernels " * 40)


class Backend(ABC):
    """Scores a query's documents."""

    name: str  # of the model
    description: str  # the engine or server, in a few words
    max_length: int | None  # tokens that pairs are truncated to; None: not known here
    calibration: ScoreCalibration | None = None
    without_calibration = "has no calibration; it is made with ettin-calibrate"

    @abstractmethod
    async def score(
        self, query: str, documents: Sequence[str], long_documents: Mapping[str, Any], refuse_truncated: bool = False
    ) -> Scored:
        """Raw logits and tokens of each document.

        Args:
            query: the query.
            documents: the documents.
            long_documents: fields of `LongDocuments`; the backend has its own values for those that are not there.
            refuse_truncated: fail if a pair would be truncated.

        Raises:
            Busy: there is no room now.
            Closed: the backend is closed.
            InputError: a text can't be scored; or, if `refuse_truncated`, a pair would be truncated. Then nothing is
                scored.
        """

    async def probe(self) -> None:  # noqa: B027 (nothing in this process can be stuck)
        """Scores one pair, beside the queue, in an engine of this process; raises whatever the engine raises."""

    @abstractmethod
    async def is_ready(self) -> bool:
        """Whether requests can be answered."""

    @property
    def counters(self) -> dict[str, float]:
        """Figures for metrics: what was scored so far, and what waits; empty where not known."""
        return {}

    def watch(self, on_batch: Callable[[int, int, float], object]) -> None:  # noqa: B027 (there are none here)
        """Calls a function with the pairs, the tokens and the engine's seconds of each batch."""

    @abstractmethod
    async def close(self) -> None:
        """Drains pending requests, then releases the engine."""


class LocalBackend(Backend):
    """An artifact in this process.

    Args:
        runtime: loaded; closed with the backend.
        limits: `max_waiting_pairs` and `request_timeout_s` apply.
    """

    def __init__(self, runtime: Runtime, limits: Limits) -> None:
        self.name = runtime.manifest.full_name
        self.description, self.max_length = runtime.description, runtime.max_length
        self.calibration = runtime.manifest.score_calibration
        pairs = [(WARMUP_QUERY, document) for document in WARMUP_DOCUMENTS]
        runtime.predict(pairs, max_length=runtime.max_length)  # as given, nothing is said of truncated texts
        self._runtime, self._limits = runtime, limits
        runtime.scheduler.cache = ScoreCache(limits.cached_scores)
        probe = runtime.tokenizer.pairs([("is the engine alive", "yes")], runtime.max_length)
        self._probe_batch = Batch.of(probe, runtime.manifest.tokenizer.pad_token_id)

    async def score(
        self, query: str, documents: Sequence[str], long_documents: Mapping[str, Any], refuse_truncated: bool = False
    ) -> Scored:
        request = Request(
            [(query, document) for document in documents],
            self._runtime.max_length,
            timeout_s=self._limits.request_timeout_s,
            refuse_truncated=refuse_truncated,
            long_documents=LongDocuments().updated(long_documents),
        )
        future = self._runtime.scheduler.submit(request, max_waiting_pairs=self._limits.max_waiting_pairs)
        return await asyncio.wrap_future(future)

    async def is_ready(self) -> bool:
        return True

    async def probe(self) -> None:
        result: Future[float] = Future()

        def score() -> None:
            try:
                result.set_result(float(self._runtime.score(self._probe_batch)[0]))
            except BaseException as error:
                result.set_exception(error)

        # A thread of its own that nothing waits for: an executor would keep the process from ending.
        threading.Thread(target=score, name="ettin-probe", daemon=True).start()
        logit = await asyncio.wrap_future(result)
        if not math.isfinite(logit):
            raise ServerError(f"the engine scored {logit}")

    @property
    def counters(self) -> dict[str, float]:
        scheduler = self._runtime.scheduler
        counts = {name: getattr(scheduler, name) for name in ("batches", "pairs", "tokens", "waiting_pairs")}
        cache = {"cache_hits": scheduler.cache.hits, "cache_misses": scheduler.cache.misses}
        return counts | {"queue_seconds": scheduler.queue_s} | cache

    def watch(self, on_batch: Callable[[int, int, float], object]) -> None:
        self._runtime.scheduler.on_batch = on_batch

    async def close(self) -> None:
        await asyncio.to_thread(self._runtime.scheduler.close, "the server is stopping", DRAIN_S)
        await asyncio.to_thread(self._runtime.close)


class TritonBackend(Backend):
    """A model that `ettin-triton` wrote, in a Triton server; gRPC.

    Args:
        address: host:port of the server's gRPC interface.
        model: its name there.
    """

    without_calibration = "has no calibration here, because it is behind Triton, which gives logits only"

    def __init__(self, address: str, model: str) -> None:
        self._module, self._error = _triton_client()
        self._client = self._module.InferenceServerClient(address)
        self._asked, self._cached = ("", 0.0), False  # version and interval of the last question, and its answer
        self.name, self.description, self.max_length = model, f"Triton Inference Server, {address}", None

    @staticmethod
    async def only_model(address: str) -> str:
        """The name of the only model in a server that takes a query and documents.

        Raises:
            UsageError: the server has none, or several; lists them.
            ServerError: it does not answer.
        """
        module, client_error = _triton_client()
        rerankers = []
        try:
            async with module.InferenceServerClient(address) as client:
                index = await client.get_model_repository_index(as_json=True, client_timeout=_ANSWER_S)
                names = [model["name"] for model in index.get("models", []) if model.get("state") == "READY"]
                for name in dict.fromkeys(names):
                    metadata = await client.get_model_metadata(name, as_json=True, client_timeout=_ANSWER_S)
                    if {tensor["name"] for tensor in metadata["inputs"]} == {"query", "documents"}:
                        rerankers.append(str(name))
        except client_error as error:
            raise ServerError(f"Triton at {address} does not answer: {error.message()}") from None
        if len(rerankers) != 1:
            listed = ", ".join(rerankers)
            raise UsageError(f"Triton at {address} has {len(rerankers)} rerankers ({listed}). Choose: --model NAME")
        return rerankers[0]

    async def score(
        self, query: str, documents: Sequence[str], long_documents: Mapping[str, Any], refuse_truncated: bool = False
    ) -> Scored:
        tensors = [self._tensor("query", [query]), self._tensor("documents", documents)]
        parameters = {name: str(value) for name, value in long_documents.items()}
        if refuse_truncated:
            parameters[REFUSE_TRUNCATED] = "true"
        try:
            result = await self._client.infer(self.name, tensors, parameters=parameters)
            if long_documents and await self._is_cached(result.get_response().model_version):
                raise InputError(
                    "Triton answers this model's requests from a cache that ignores parameters. Leave out "
                    f"{', '.join(long_documents)}, or publish the model without --response-cache"
                )
        except self._error as error:
            raise _translated(error) from None
        arrays = [result.as_numpy(name) for name in ("scores", "tokens", "truncated")]
        if arrays[-1] is None:
            raise ServerError(f"Triton: an earlier ettin-triton published '{self.name}'. Publish the artifact again")
        truncated = np.flatnonzero(arrays[-1][0])
        if refuse_truncated and truncated.size:  # an answer of Triton's response cache, which ignores parameters
            raise InputError(
                f"document {truncated[0]} is truncated, and truncation was refused. Shorten it, or allow it"
            )
        return Scored(*(array[0] for array in arrays))

    async def _is_cached(self, version: str) -> bool:
        """Whether Triton may have answered from its cache; asked of each version, and again after some seconds."""
        question = version, time.monotonic() // _ASK_EVERY_S
        if question != self._asked:
            answer = await self._client.get_model_config(self.name, version, as_json=True, client_timeout=_ANSWER_S)
            self._asked, self._cached = question, bool(answer["config"].get("response_cache", {}).get("enable"))
        return self._cached

    def _tensor(self, name: str, texts: Sequence[str]) -> Any:
        tensor = self._module.InferInput(name, [1, len(texts)], "BYTES")
        array = np.empty((1, len(texts)), np.object_)
        try:
            array[0] = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: not valid Unicode ({error.reason})") from None
        tensor.set_data_from_numpy(array)
        return tensor

    async def is_ready(self) -> bool:
        try:
            return bool(await self._client.is_model_ready(self.name, client_timeout=_ANSWER_S))
        except self._error:
            return False

    async def close(self) -> None:
        await self._client.close()


def _triton_client() -> tuple[Any, Any]:
    """Triton's client, and the exception that it raises."""
    try:
        import tritonclient.grpc.aio as module
        from tritonclient.utils import InferenceServerException
    except ModuleNotFoundError as error:
        raise MissingDependency("a gateway to Triton", str(error.name), "gateway") from None
    return module, InferenceServerException


def _translated(error: Any) -> EttinError:
    """Our error for one of Triton's client."""
    status, message = str(error.status()), str(error.message())
    if "UNAVAILABLE" in status or "RESOURCE_EXHAUSTED" in status:
        _LOG.warning(json.dumps({"triton": message}))  # it may name addresses, which are not for clients
        return Busy("Triton has no room or does not answer", 1.0)
    if "INVALID_ARGUMENT" in status:
        return InputError(message)
    return ServerError(f"Triton: {message}")
