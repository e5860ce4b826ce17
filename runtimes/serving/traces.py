"""OpenTelemetry: a span for each request, sent in the background."""

from collections.abc import Mapping

from ettin.artifacts.errors import MissingDependency, UsageError

_TIMEOUT_S = 5


class Traces:
    """Sends spans to a collector (OTLP over HTTP). A collector that is slow or absent delays no request.

    Args:
        url: where to, such as http://localhost:4318/v1/traces.

    Raises:
        MissingDependency: OpenTelemetry is not installed.
        UsageError: not the URL of an HTTP server.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--traces is '{url}', expected a URL such as http://localhost:4318/v1/traces")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] != "opentelemetry":
                raise
            raise MissingDependency("--traces", str(error.name), "otel") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ettin-serve"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=_TIMEOUT_S)))
        self._tracer = self._provider.get_tracer("ettin.serve")
        self._parent, self._kind = TraceContextTextMapPropagator().extract, SpanKind.SERVER

    def record(
        self, headers: Mapping[bytes, bytes], start_ns: int, end_ns: int, facts: Mapping[str, str | int | float]
    ) -> None:
        """Records a request that is answered, as a child of the span that its `traceparent` names.

        Args:
            headers: of the request.
            start_ns: when it came, since 1970.
            end_ns: when it was answered.
            facts: what the access log says of it; no texts.
        """
        sent = {"traceparent": headers.get(b"traceparent", b"").decode("latin-1")}
        attributes = {f"ettin.{name}": value for name, value in facts.items()}
        name = f"{facts['method']} {facts['route']}"
        span = self._tracer.start_span(name, self._parent(sent), self._kind, attributes, start_time=start_ns)
        span.end(end_ns)

    def close(self) -> None:
        """Sends what is left, for some seconds at most."""
        self._provider.shutdown()
