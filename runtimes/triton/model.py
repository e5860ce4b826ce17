"""The model in Triton's Python backend: texts in, scores out. Only the backend's own process imports it."""

import json
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from ettin.artifacts.errors import Busy, Closed, EttinError, Expired, InputError, UsageError
from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes.arguments import Pair
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.loading import load
from ettin.runtimes.long_documents import LongDocuments
from ettin.runtimes.processes import give_memory_back
from ettin.runtimes.request import Request, Scored
from ettin.runtimes.scheduler import Scheduler
from ettin.runtimes.serving.backends import DRAIN_S, REFUSE_TRUNCATED
from ettin.runtimes.tokenizer import artifact_tokenizer
from ettin.runtimes.triton import ARTIFACT

_ASK_EVERY_S = 0.1  # whether a client is still there: a question to the server's process
_REPORT_EVERY_S = 0.25
_TRIM_EVERY_S = 5.0
_PADDED_TOKENS = 4096  # in a batch for a native engine with padded inputs
_PADDED_MULTIPLE = 16
_MAX_WAITING_PAIRS = 8192  # further pairs wait in Triton's own queue


class _Model(ABC):
    """Hands requests to the scheduler and returns at once; each is answered when its own scores are there."""

    _scheduler: Scheduler
    _max_length: int
    _trimmed_s = 0.0

    def initialize(self, args: dict[str, str]) -> None:
        """Loads one version. If that fails, Triton shows the reason and serves the other models."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._is_cached = bool(config.get("response_cache", {}).get("enable"))
        version = args["model_version"]
        try:
            self._long_documents = LongDocuments().updated(parameters)
            self._load(Path(args["model_repository"]) / version / ARTIFACT, version, parameters)
        except EttinError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._gauges = _Gauges(self._scheduler, {"model": args["model_name"], "version": version})

    @abstractmethod
    def _load(self, artifact: Path, version: str, parameters: dict[str, str]) -> None:
        """Sets the scheduler and the number of tokens that pairs are truncated to."""

    def execute(self, requests: list[Any]) -> None:
        """Accepts requests, each with queries [rows, 1] and documents [rows, documents]."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                pairs, shape = _texts(request)
                parameters = json.loads(request.parameters() or "{}")
                # Waiting for room here keeps later requests in Triton's queue, which has limits and is measured.
                accepted = Request(
                    pairs,
                    self._max_length,
                    _IsCancelled(sender),
                    timeout_s=request.timeout() / 1e6 or None,
                    refuse_truncated=str(parameters.get(REFUSE_TRUNCATED)).lower() == "true",
                    long_documents=self._policy(parameters),
                )
                future = self._scheduler.submit(accepted, max_waiting_pairs=_MAX_WAITING_PAIRS, wait=True)
            except EttinError as error:
                _send(sender, _failure(error))
            else:
                future.add_done_callback(partial(self._answer, sender, shape))
        self._gauges.report()
        if time.monotonic() - self._trimmed_s > _TRIM_EVERY_S:
            self._trimmed_s = time.monotonic()
            give_memory_back()

    def _policy(self, parameters: dict[str, Any]) -> LongDocuments:
        policy = self._long_documents.updated(parameters)
        if self._is_cached and policy != self._long_documents:
            raise InputError(
                "long_documents: Triton's response cache does not tell requests with other parameters apart. Publish "
                "the model without --response-cache, or with these options"
            )
        return policy

    def _answer(self, sender: Any, shape: tuple[int, ...], future: "Future[Scored]") -> None:
        """Sends the result of a request."""
        self._gauges.report()
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            _send(sender, _failure(error))
            return
        scored = future.result()
        arrays = {"scores": scored.logits, "tokens": scored.tokens, "truncated": scored.truncated}
        tensors = [pb_utils.Tensor(name, array.reshape(shape)) for name, array in arrays.items()]
        _send(sender, pb_utils.InferenceResponse(tensors))

    def finalize(self) -> None:
        """Unloads the model after the accepted requests are done."""
        self._scheduler.close("the model is being unloaded", DRAIN_S)


class HostedModel(_Model):
    """The whole artifact in our runtime."""

    def _load(self, artifact: Path, version: str, parameters: dict[str, str]) -> None:
        texts = dict.fromkeys(("device", "precision", "trusted_key"), str)
        types = {**dict.fromkeys(("threads", "streams", "max_length"), int), **texts}
        settings: dict[str, Any] = {key: types[key](value) for key, value in parameters.items() if key in types}
        self._runtime = load(artifact, **settings)
        self._scheduler, self._max_length = self._runtime.scheduler, self._runtime.max_length

    def finalize(self) -> None:
        super().finalize()
        self._runtime.close()


class NativeModel(_Model):
    """Tokenising and batches here, the engine in one of Triton's own backends."""

    def _load(self, artifact: Path, version: str, parameters: dict[str, str]) -> None:
        key = Path(parameters["trusted_key"]) if "trusted_key" in parameters else None
        with OpenArtifact(artifact, trusted_key=key) as opened:  # only the files that are read here are compared
            manifest, tokenizer = opened.manifest, artifact_tokenizer(opened)
        self._engine, self._version = parameters["engine"], int(version)
        self._is_packed = manifest.engine is not None
        if self._is_packed:
            tokens, pairs = manifest.batch_limits
            limits = BatchLimits(concurrency=2, batch_tokens=tokens, batch_pairs=pairs, in_parallel=False)
        else:
            limits = BatchLimits(concurrency=2, batch_tokens=_PADDED_TOKENS, length_multiple=_PADDED_MULTIPLE)
        self._max_length = int(parameters.get("max_length", manifest.max_length_tokens))
        self._scheduler = Scheduler(tokenizer, self._score, limits, manifest.tokenizer.pad_token_id)

    def _score(self, batch: Batch) -> NDArray[np.float32]:
        if self._is_packed:
            feeds = batch.packed()
        else:
            feeds = dict(zip(("input_ids", "attention_mask"), batch.padded(_PADDED_MULTIPLE), strict=True))
        request = pb_utils.InferenceRequest(
            model_name=self._engine,
            model_version=self._version,
            requested_output_names=["logits"],
            inputs=[pb_utils.Tensor(name, array) for name, array in feeds.items()],
        )
        response = request.exec()
        if response.has_error():
            raise EttinError(f"{self._engine}: {response.error().message()}")
        logits = pb_utils.get_output_tensor_by_name(response, "logits").as_numpy()
        return np.asarray(logits[:, 0], np.float32)


class _IsCancelled:
    """Whether the client has left; the server's process is asked now and then."""

    def __init__(self, sender: Any) -> None:
        self._sender, self._asked_s, self._lock = sender, time.monotonic(), threading.Lock()

    def __call__(self) -> bool:
        with self._lock:
            if time.monotonic() - self._asked_s < _ASK_EVERY_S:
                return False
            self._asked_s = time.monotonic()
        return bool(self._sender.is_cancelled())


class _Gauges:
    """Metrics of the scheduler's queue among Triton's own: Triton counts requests in this queue as being computed."""

    def __init__(self, scheduler: Scheduler, labels: dict[str, str]) -> None:
        self._scheduler, self._lock, self._reported_s = scheduler, threading.Lock(), 0.0
        texts = {
            "ettin_waiting_pairs": "Pairs accepted and not scored yet",
            "ettin_queue_seconds": "Time that these will take, at the measured speed",
        }
        try:
            self._families = [
                pb_utils.MetricFamily(name, text, kind=pb_utils.MetricFamily.GAUGE) for name, text in texts.items()
            ]
            self._metrics = [family.Metric(labels=labels) for family in self._families]
        except pb_utils.TritonModelException:  # the server was started with --allow-metrics=false
            self._metrics = []

    def report(self) -> None:
        """Sets the metrics now and then, and always when nothing waits."""
        with self._lock:
            waiting, now_s = self._scheduler.waiting_pairs, time.monotonic()
            if not self._metrics or (waiting and now_s - self._reported_s < _REPORT_EVERY_S):
                return
            self._reported_s = now_s
            for metric, value in zip(self._metrics, (waiting, self._scheduler.queue_s), strict=True):
                metric.set(value)


def _texts(request: Any) -> tuple[list[Pair], tuple[int, ...]]:
    """The pairs of a request, and the shape of its documents."""
    queries, documents = (
        pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("query", "documents")
    )
    pairs = []
    for row, (query, texts) in enumerate(zip(queries[:, 0], documents, strict=True)):
        first = _text(query, f"query {row}")
        pairs += [(first, _text(text, f"document {index}")) for index, text in enumerate(texts)]
    return pairs, documents.shape


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 (byte {error.start})") from None


def _failure(error: BaseException | None) -> Any:
    """The answer to a request that failed; None: its client left."""
    codes = pb_utils.TritonError
    if error is None:
        failure = codes("the client left", codes.CANCELLED)
    elif isinstance(error, (Busy, Closed, Expired)):
        failure = codes(str(error), codes.UNAVAILABLE)
    elif isinstance(error, (InputError, UsageError)):
        failure = codes(str(error), codes.INVALID_ARG)
    else:
        failure = codes(f"{type(error).__name__}: {error}", codes.INTERNAL)
    return pb_utils.InferenceResponse(error=failure)


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
