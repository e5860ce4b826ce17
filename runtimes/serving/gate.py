"""The gate that every HTTP request passes (API key, limits, access log, metrics), and the health checks."""

import asyncio
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ettin.artifacts.errors import Busy
from ettin.runtimes.request import Scored
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import Bodies
from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.messages import CLOSE, LOG, ClientLeft, Refused, answer_to_error, clipped
from ettin.runtimes.serving.traces import Traces

PROBES = ("/health", "/health/live", "/health/ready")  # answered even when no other request is
_WITHOUT_KEY = (*PROBES, "/metrics")
_ACCESS = logging.getLogger("ettin.access")
_CLIENT_LEFT = 499  # nginx's status for it, for log and metrics
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PAIRS = tuple(2**power for power in range(0, 13, 2))
_TOKENS = tuple(2**power for power in range(5, 18, 2))
_ENGINE_METRICS = {
    "batches": (CounterMetricFamily, "Batches scored"),
    "pairs": (CounterMetricFamily, "Pairs scored"),
    "tokens": (CounterMetricFamily, "Tokens scored"),
    "waiting_pairs": (GaugeMetricFamily, "Pairs accepted and not scored yet"),
    "queue_seconds": (GaugeMetricFamily, "Time that these will take, at the measured speed"),
    "cache_hits": (CounterMetricFamily, "Pairs whose score was in the cache"),
    "cache_misses": (CounterMetricFamily, "Pairs whose score was not in the cache"),
}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_PROBE_EVERY_S = 1.0
_PROBE_WAIT_S = 1.0  # for a probe before the last result is used


class Metrics(Collector):
    """Prometheus metrics of one service."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends, self.registry = backends, CollectorRegistry()
        self.requests = Counter("ettin_requests", "Answers", ["route", "status"], registry=self.registry)
        self.seconds = self._histogram("request_seconds", "Time to answer", _SECONDS, "route")
        self._documents = Counter("ettin_documents", "Documents scored", ["model"], registry=self.registry)
        self._waits = self._histogram("wait_seconds", "Time from a request to its first batch", _SECONDS)
        batch = (
            self._histogram("batch_pairs", "Pairs in a batch", _PAIRS),
            self._histogram("batch_tokens", "Tokens in a batch, without padding", _TOKENS),
            self._histogram("engine_seconds", "Time of the engine for a batch", _SECONDS),
        )
        for backend in backends:
            backend.watch(partial(_observe, [histogram.labels(backend.name) for histogram in batch]))
        self.registry.register(self)

    def count(self, model: str, scored: Scored) -> None:
        """Counts the documents of a request that is done."""
        self._documents.labels(model).inc(len(scored.logits))
        if scored.queue_s is not None:
            self._waits.labels(model).observe(scored.queue_s)

    def collect(self) -> Iterable[Metric]:
        """The counts of the schedulers, when Prometheus asks."""
        for name, (kind, text) in _ENGINE_METRICS.items():
            family = kind(f"ettin_{name}", text, labels=["model"])
            for backend in self._backends:
                if name in (counters := backend.counters):
                    family.add_metric([backend.name], counters[name])
            yield family

    def _histogram(self, name: str, text: str, buckets: Sequence[float], label: str = "model") -> Histogram:
        return Histogram(f"ettin_{name}", text, [label], buckets=buckets, registry=self.registry)


def _observe(histograms: Sequence[Histogram], *values: float) -> None:
    for histogram, value in zip(histograms, values, strict=True):
        histogram.observe(value)


class Gate:
    """ASGI middleware. Leaves a request's body in `scope["ettin.body"]` and facts for the log in `scope["ettin"]`.

    With an API key, clients must send `Authorization: Bearer KEY`. A client's `X-Request-Id` is kept if it has 1 to 128
    letters, digits, dots, hyphens and underscores; other requests get one.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        bodies: Bodies,
        api_key: str | None,
        metrics: Metrics,
        traces: Traces | None,
    ) -> None:
        self._app, self._limits, self._bodies, self._metrics, self._traces = app, limits, bodies, metrics, traces
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._requests = 0  # in progress, without probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, start_ns, status = time.perf_counter(), time.time_ns(), 0
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        identifier = sent.decode() if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope["ettin"] = {"id": identifier}

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identifier.encode())]
            await send(message)

        try:
            await self._answer(scope, receive, send_noting_status)
        except ClientLeft:
            pass
        except Exception as error:
            answer = answer_to_error(error, identifier)
            if status:
                raise  # the answer has begun: uvicorn closes the connection
            await answer(scope, receive, send_noting_status)
        finally:
            self._record(scope, status or _CLIENT_LEFT, time.perf_counter() - start, start_ns)

    def _record(self, scope: Scope, status: int, seconds: float, start_ns: int) -> None:
        """Writes metrics, a line of the access log and a span, which have no texts."""
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        request = {"method": clipped(scope["method"], 16), "path": clipped(scope["path"], 200)}
        request |= {"status": status, "ms": round(1000 * seconds, 1)} | scope["ettin"]
        _ACCESS.info(json.dumps(request))
        if self._traces is not None and scope["path"] not in _WITHOUT_KEY:
            end_ns = start_ns + round(1e9 * seconds)
            self._traces.record(dict(scope["headers"]), start_ns, end_ns, request | {"route": route})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers health checks at once, and other requests if the gate lets them in."""
        if scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        self._requests += 1
        try:
            headers = dict(scope["headers"])
            self._admit(scope["path"], headers)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            async with self._bodies.received(headers, receive) as scope["ettin.body"]:
                await self._app(scope, receive, send)
        except Refused as error:  # answered before the request is counted as done
            await answer_to_error(error, scope["ettin"]["id"])(scope, receive, send)
        finally:
            self._requests -= 1

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuses a request without the key, or without room for it."""
        sent = headers.get(b"authorization", b"")
        if self._authorization and path not in _WITHOUT_KEY and not secrets.compare_digest(sent, self._authorization):
            text = "missing or wrong API key. Send it: Authorization: Bearer KEY"
            raise Refused(HTTPStatus.UNAUTHORIZED, text, "unauthorized")
        if self._requests > self._limits.max_connections and not self._bodies.evict_oldest():
            text = f"{self._limits.max_connections} requests are in progress, the limit. Try again in 1 s"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, "overloaded", {**CLOSE, "Retry-After": "1"})


class Health:
    """Liveness and readiness of all backends. For one event loop."""

    def __init__(self, backends: Sequence[Backend], timeout_s: float) -> None:
        self.is_draining = False  # the server was told to stop
        self._backends, self._engines = backends, [_Liveness(backend, timeout_s) for backend in backends]

    async def check_model(self) -> None:
        """Refuses with 503 if a model is not loaded."""
        for backend in self._backends:
            if not await backend.is_ready():
                raise _unhealthy(f"model {backend.name} is not ready")

    async def check_live(self) -> None:
        """Refuses with 503 if an engine is stuck or fails."""
        await asyncio.gather(*(engine.check() for engine in self._engines))

    async def check_ready(self) -> None:
        """Refuses with 503 if no requests should be sent here. A full queue does not count: it answers 429 itself."""
        if self.is_draining:
            raise _unhealthy("the server is stopping")
        await self.check_model()
        await self.check_live()


class _Liveness:
    """Whether an engine lives, by a probe: one pair that is scored beside the queue. For one event loop.

    Liveness is lost when neither the probe nor any batch of requests has ended for `timeout_s`, or when the probe
    fails. A busy engine stays alive: a batch that ends counts as much as the probe.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self._backend, self._timeout_s = backend, timeout_s
        self._probe: asyncio.Task[None] | None = None
        self._failure = ""
        self._probe_start_s = self._probe_end_s = self._queue_start_s = self._batch_end_s = -_PROBE_EVERY_S
        self._batches, self._had_queue = 0.0, False

    async def check(self) -> None:
        """Refuses with 503 if the engine is stuck or fails. The result of a probe is used again for a second."""
        if self._probe is None and time.monotonic() - self._probe_end_s >= _PROBE_EVERY_S:
            self._probe_start_s = time.monotonic()
            self._probe = asyncio.create_task(self._run_probe())
        if self._probe is not None:
            await asyncio.wait({self._probe}, timeout=min(_PROBE_WAIT_S, self._timeout_s))
        silent_s = self._silent_s()
        if silent_s > self._timeout_s:
            raise _unhealthy(f"the engine has scored nothing for {silent_s:.0f} s")
        if self._failure:
            raise _unhealthy("the engine failed to score a pair; the log has the reason")

    def _silent_s(self) -> float:
        """Time for which the engine has had work and finished none of it."""
        now_s, counters = time.monotonic(), self._backend.counters
        has_queue, batches = bool(counters.get("waiting_pairs")), counters.get("batches", 0.0)
        if batches != self._batches:
            self._batch_end_s, self._batches = now_s, batches
        if has_queue and not self._had_queue:
            self._queue_start_s = now_s
        self._had_queue = has_queue
        starts_s = [self._probe_start_s] * (self._probe is not None) + [self._queue_start_s] * has_queue
        return now_s - max(min(starts_s), self._batch_end_s) if starts_s else 0.0

    async def _run_probe(self) -> None:
        try:
            await self._backend.probe()
            self._failure = ""
        except Busy:  # a busy engine works
            self._failure = ""
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            self._failure = clipped(f"{type(error).__name__}: {error}", 1000)
            LOG.error("liveness: %r", self._failure)
        finally:
            self._probe_end_s, self._probe = time.monotonic(), None


def _unhealthy(reason: str) -> Refused:
    return Refused(HTTPStatus.SERVICE_UNAVAILABLE, reason, "unhealthy")
