"""The gate that every HTTP request passes (API key, limits, access log, metrics), and the health checks."""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import Iterable
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ettin.artifacts.errors import Busy
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import Bodies
from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.messages import CLOSE, LOG, ClientLeft, Refused, answer_to_error, clipped

PROBES = ("/health", "/health/live", "/health/ready")  # answered even when no other request is
_WITHOUT_KEY = (*PROBES, "/metrics")
_ACCESS = logging.getLogger("ettin.access")
_CLIENT_LEFT = 499  # nginx's status for it, for log and metrics
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ENGINE_METRICS = {
    "batches": (CounterMetricFamily, "Batches scored"),
    "pairs": (CounterMetricFamily, "Pairs scored"),
    "tokens": (CounterMetricFamily, "Tokens scored"),
    "waiting_pairs": (GaugeMetricFamily, "Pairs accepted and not scored yet"),
    "queue_seconds": (GaugeMetricFamily, "Time that these will take, at the measured speed"),
}
_PROBE_EVERY_S = 1.0
_PROBE_WAIT_S = 1.0  # for a probe before the last result is used


class Metrics(Collector):
    """Prometheus metrics of one service."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.registry = backend, CollectorRegistry()
        self.requests = Counter("ettin_requests", "Answers", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "ettin_request_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.documents = Counter("ettin_documents", "Documents scored for clients", registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The counts of the scheduler, when Prometheus asks."""
        for name, value in self._backend.counters.items():
            family, text = _ENGINE_METRICS[name]
            yield family(f"ettin_{name}", text, value=value)


class Gate:
    """ASGI middleware. Leaves a request's body in `scope["ettin.body"]` and facts for the log in `scope["ettin"]`.

    With an API key, clients must send `Authorization: Bearer KEY`.
    """

    def __init__(self, app: ASGIApp, limits: Limits, bodies: Bodies, api_key: str | None, metrics: Metrics) -> None:
        self._app, self._limits, self._bodies, self._metrics = app, limits, bodies, metrics
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._requests = 0  # in progress, without probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, identifier = time.perf_counter(), 0, uuid.uuid4().hex
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
            self._record(scope, status or _CLIENT_LEFT, time.perf_counter() - start)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Writes metrics and a line of the access log, which has no texts."""
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        request = {"method": clipped(scope["method"], 16), "path": clipped(scope["path"], 200)}
        _ACCESS.info(json.dumps(request | {"status": status, "ms": round(1000 * seconds, 1)} | scope["ettin"]))

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
    """Liveness and readiness, by a probe: one pair that is scored beside the queue. For one event loop.

    Liveness is lost when neither the probe nor any batch of requests has ended for `timeout_s`, or when the probe
    fails. A busy engine stays alive: a batch that ends counts as much as the probe.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.is_draining = False  # the server was told to stop
        self._backend, self._timeout_s = backend, timeout_s
        self._probe: asyncio.Task[None] | None = None
        self._failure = ""
        self._probe_start_s = self._probe_end_s = self._queue_start_s = self._batch_end_s = -_PROBE_EVERY_S
        self._batches, self._had_queue = 0.0, False

    async def check_model(self) -> None:
        """Refuses with 503 if the model is not loaded."""
        if not await self._backend.is_ready():
            raise _unhealthy("the model is not ready")

    async def check_live(self) -> None:
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

    async def check_ready(self) -> None:
        """Refuses with 503 if no requests should be sent here. A full queue does not count: it answers 429 itself."""
        if self.is_draining:
            raise _unhealthy("the server is stopping")
        await self.check_model()
        await self.check_live()

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
