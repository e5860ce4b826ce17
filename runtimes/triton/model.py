"""What Triton's Python backend runs: texts in, scores out. Imported by the backend's own process only."""

import json
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from ettin.artifacts.errors import Busy, Closed, EttinError, Expired, InputError
from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes.arguments import Pair
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.loading import load
from ettin.runtimes.processes import give_memory_back
from ettin.runtimes.request import Request, Scored
from ettin.runtimes.scheduler import Scheduler
from ettin.runtimes.serving.backends import DRAIN_S, REFUSE_TRUNCATED
from ettin.runtimes.tokenizer import artifact_tokenizer
from ettin.runtimes.triton.repository import ARTIFACT

_ASK_EVERY_S = 0.1  # whether a client is still there: a question to the server's process
_REPORT_EVERY_S = 0.25
_TRIM_EVERY_S = 5.0
_PADDED_TOKENS = 4096  # of a batch for a native engine that takes rectangles
_PADDED_MULTIPLE = 16
_MAX_WAITING_PAIRS = 8192  # what comes later waits in Triton's own queue


class _Model(ABC):
    """Hands requests to the scheduler and returns at once; each is answered when its own scores are there."""

    _scheduler: Scheduler
    _max_length: int

    def initialize(self, args: dict[str, str]) -> None:
        """Triton's: loads one version.

        Raises:
            TritonModelException: it can't be loaded; Triton shows the reason and serves the others.
        """
        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        version = args["model_version"]
        try:
            self._load(Path(args["model_repository"]) / version / ARTIFACT, version, parameters)
        except EttinError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._gauges = _Gauges(self._scheduler, {"model": args["model_name"], "version": version})

    @abstractmethod
    def _load(self, artifact: Path, version: str, parameters: dict[str, str]) -> None:
        """Sets what scores, and the tokens that it truncates to."""

    _trimmed_s = 0.0

    def execute(self, requests: list[Any]) -> None:
        """Triton's: accepts requests, each queries [rows, 1] and documents [rows, documents]."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                pairs, shape = _texts(request)
                # Waiting for room here keeps what comes later in Triton's queue, which has limits and is measured.
                accepted = Request(
                    pairs,
                    self._max_length,
                    _Gone(sender),
                    timeout_s=request.timeout() / 1e6 or None,
                    refuse_truncated=bool(json.loads(request.parameters() or "{}").get(REFUSE_TRUNCATED)),
                )
                future = self._scheduler.submit(accepted, max_waiting_pairs=_MAX_WAITING_PAIRS, wait=True)
            except EttinError as error:
                _fail(sender, error)
                continue
            future.add_done_callback(_Answer(sender, shape, self._gauges))
        self._gauges.report()
        if time.monotonic() - self._trimmed_s > _TRIM_EVERY_S:
            self._trimmed_s = time.monotonic()
            give_memory_back()

    def finalize(self) -> None:
        """Triton's: unloads, after what was accepted is done."""
        self._scheduler.close("the model is being unloaded", DRAIN_S)


class HostedModel(_Model):
    """The whole artifact in our runtime."""

    def _load(self, artifact: Path, version: str, parameters: dict[str, str]) -> None:
        numbers, texts = ("threads", "streams", "max_length"), ("device", "trusted_key")
        arguments: dict[str, Any] = {key: int(parameters[key]) for key in numbers if key in parameters}
        arguments |= {key: parameters[key] for key in texts if key in parameters}
        self._runtime = load(artifact, **arguments)
        self._scheduler, self._max_length = self._runtime.scheduler, self._runtime.max_length

    def finalize(self) -> None:
        """See `_Model`."""
        super().finalize()
        self._runtime.close()


class NativeModel(_Model):
    """Tokenising and batches here, the engine in a backend of Triton's."""

    def _load(self, artifact: Path, version: str, parameters: dict[str, str]) -> None:
        with OpenArtifact(artifact) as opened:  # its engine is elsewhere: only what is read here is compared
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


class _Gone:
    """Whether the client has left."""

    def __init__(self, sender: Any) -> None:
        self._sender, self._asked, self._lock = sender, time.monotonic(), threading.Lock()

    def __call__(self) -> bool:
        with self._lock:
            if time.monotonic() - self._asked < _ASK_EVERY_S:
                return False
            self._asked = time.monotonic()
        return bool(self._sender.is_cancelled())


class _Gauges:
    """Among Triton's own metrics, what waits in here: Triton takes for computing what is still in our queue."""

    def __init__(self, scheduler: Scheduler, labels: dict[str, str]) -> None:
        self._scheduler, self._lock, self._reported = scheduler, threading.Lock(), 0.0
        texts = {
            "ettin_waiting_pairs": "Pairs accepted and not scored yet",
            "ettin_queue_seconds": "Time that these will take, at the measured speed",
        }
        try:
            self._families = [pb_utils.MetricFamily(*each, kind=pb_utils.MetricFamily.GAUGE) for each in texts.items()]
            self._metrics = [family.Metric(labels=labels) for family in self._families]
        except pb_utils.TritonModelException:  # the server was started with --allow-metrics=false
            self._metrics = []

    def report(self) -> None:
        """Now and then, and always that nothing waits."""
        with self._lock:
            waiting, now = self._scheduler.waiting_pairs, time.monotonic()
            if not self._metrics or (waiting and now - self._reported < _REPORT_EVERY_S):
                return
            self._reported = now
            for metric, value in zip(self._metrics, (waiting, self._scheduler.queue_s), strict=True):
                metric.set(value)


class _Answer:
    """Sends a result."""

    def __init__(self, sender: Any, shape: tuple[int, ...], gauges: "_Gauges") -> None:
        self._sender, self._shape, self._gauges = sender, shape, gauges

    def __call__(self, future: "Future[Scored]") -> None:
        self._gauges.report()
        if future.cancelled():
            _fail(self._sender, None)
            return
        error = future.exception()
        if error is not None:
            _fail(self._sender, error)
            return
        scored = future.result()
        tensors = [
            pb_utils.Tensor("scores", scored.logits.reshape(self._shape)),
            pb_utils.Tensor("tokens", scored.tokens.reshape(self._shape)),
        ]
        _send(self._sender, pb_utils.InferenceResponse(tensors))


def _texts(request: Any) -> tuple[list[Pair], tuple[int, ...]]:
    queries = pb_utils.get_input_tensor_by_name(request, "query").as_numpy()
    documents = pb_utils.get_input_tensor_by_name(request, "documents").as_numpy()
    pairs = []
    for row, (query, texts) in enumerate(zip(queries[:, 0], documents, strict=True)):
        first = _text(query, f"query {row}")
        pairs += [(first, _text(each, f"document {at}")) for at, each in enumerate(texts)]
    return pairs, documents.shape


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 (byte {error.start})") from None


def _fail(sender: Any, error: BaseException | None) -> None:
    codes = pb_utils.TritonError
    if error is None:
        failure = codes("the client left", codes.CANCELLED)
    elif isinstance(error, (Busy, Closed, Expired)):
        failure = codes(str(error), codes.UNAVAILABLE)
    elif isinstance(error, InputError):
        failure = codes(str(error), codes.INVALID_ARG)
    else:
        failure = codes(f"{type(error).__name__}: {error}", codes.INTERNAL)
    _send(sender, pb_utils.InferenceResponse(error=failure))


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
