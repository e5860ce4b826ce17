"""What every HTTP request passes: API key, limits, access log without texts, metrics."""

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

from ettin.runtimes.serving.answers import CLOSE, ClientLeft, Refused, clipped, internal_failure
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import PROBES, Bodies, Limits

ACCESS = logging.getLogger("ettin.access")
OPEN = (*PROBES, "/metrics")  # without a key: for probes and scrapers
_CLIENT_LEFT = 499  # nginx' number, for log and metrics
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Of one service, in Prometheus' form."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("ettin_requests", "Answers", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "ettin_request_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.documents = Counter("ettin_documents", "Documents scored for clients", registry=self.registry)
        self.registry.register(_Engine(backend))


class _Engine(Collector):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterable[Metric]:
        """Prometheus': what the scheduler counts."""
        texts = {
            "batches": "Batches scored",
            "pairs": "Pairs scored",
            "tokens": "Tokens scored",
            "waiting_pairs": "Pairs accepted and not scored yet",
            "queue_seconds": "Time that these will take, at the measured speed",
        }
        for name, value in self._backend.counters.items():
            kind = GaugeMetricFamily if name in ("waiting_pairs", "queue_seconds") else CounterMetricFamily
            yield kind(f"ettin_{name}", texts[name], value=value)


class Gate:
    """ASGI middleware. Leaves a request's body in `scope["ettin.body"]` and its own notes in `scope["ettin"]`.

    Args:
        app: what it guards.
        limits: of the service.
        bodies: request bodies in memory.
        api_key: that clients must show, `Authorization: Bearer KEY`; None: none.
        metrics: where it counts.
    """

    def __init__(self, app: ASGIApp, limits: Limits, bodies: Bodies, api_key: str | None, metrics: Metrics) -> None:
        self._app, self._limits, self._bodies, self._metrics = app, limits, bodies, metrics
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._requests = 0  # in progress, without probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, identifier = time.perf_counter(), 0, uuid.uuid4().hex
        scope["ettin"] = {"id": identifier}

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identifier.encode())]
            await send(message)

        try:
            await self._answered(scope, receive, watched)
        except ClientLeft:
            pass
        except Exception as error:
            answer = internal_failure(scope, error, HTTPStatus.INTERNAL_SERVER_ERROR)
            if status:
                raise  # the answer has begun: uvicorn closes the connection
            await answer(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            status = status or _CLIENT_LEFT
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            line = {
                "method": clipped(scope["method"], 16),
                "path": clipped(scope["path"], 200),
                "status": status,
                "ms": round(1000 * seconds, 1),
            }
            ACCESS.info(json.dumps(line | scope["ettin"]))

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        self._requests += 1
        try:
            await self._guarded(scope, receive, send)
        except Refused as error:
            await error.answer()(scope, receive, send)
        finally:
            self._requests -= 1

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if not self._may_enter(scope["path"], headers):
            text = "missing or wrong API key. Send it: Authorization: Bearer KEY"
            raise Refused(HTTPStatus.UNAUTHORIZED, text, "unauthorized")
        if self._requests > self._limits.max_connections and not self._bodies.evict_oldest():
            text = f"{self._limits.max_connections} requests are in progress, the limit. Try again in 1 s"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, "overloaded", {**CLOSE, "Retry-After": "1"})
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        async with self._bodies.received(headers, receive) as body:
            scope["ettin.body"] = body
            await self._app(scope, receive, send)

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._expected is None or path in OPEN:
            return True
        return secrets.compare_digest(headers.get(b"authorization", b""), self._expected)
