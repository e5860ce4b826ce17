"""What every HTTP request passes: size limit, API key, access log without texts, metrics."""

import json
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ettin.runtimes.serving.backends import Backend

ACCESS = logging.getLogger("ettin.access")
OPEN = ("/health", "/metrics")  # without a key: for probes and scrapers
_DRAIN = 4  # times the limit: what is larger is not even read to its end
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Limits:
    """What one request may be.

    Args:
        max_body_bytes: its size.
        max_documents: how many it may bring.
    """

    max_body_bytes: int = 32 << 20
    max_documents: int = 10_000


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
        """Prometheus': what the batcher counts."""
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
    """ASGI middleware.

    Args:
        app: what it guards.
        limits: of a request.
        api_key: that clients must show, `Authorization: Bearer KEY`; None: none.
        metrics: where it counts.
    """

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            about = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(1000 * seconds, 1)}
            ACCESS.info(json.dumps(about | scope.get("ettin", {})))

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if not self._may_enter(scope["path"], headers):
            text = "missing or wrong API key. Send it: Authorization: Bearer KEY"
            await failure(HTTPStatus.UNAUTHORIZED, text, "unauthorized")(scope, receive, send)
            return
        body = await self._body(headers, receive)
        if body is None:
            text = f"the request is larger than {self._limits.max_body_bytes} bytes. Send fewer documents at a time"
            answer = failure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, "validation", {"Connection": "close"})
            await answer(scope, receive, send)
            return
        is_given = False

        async def replayed() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()  # whether the client hangs up
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._expected is None or path in OPEN:
            return True
        return secrets.compare_digest(headers.get(b"authorization", b""), self._expected)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """All of it; None if it is too large: read all the same, for clients look for an answer when they have sent."""
        most = self._limits.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        is_too_large = declared.isdigit() and int(declared) > most
        parts, size = [], 0
        while size <= _DRAIN * most:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            is_too_large = is_too_large or size > most
            if not is_too_large:
                parts.append(part)
            if not message.get("more_body", False):
                break
        return None if is_too_large else b"".join(parts)


def failure(status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as TEI's clients (`error`, `error_type`) and Cohere's (`message`) expect it."""
    return JSONResponse({"error": message, "error_type": kind, "message": message}, int(status), headers)
