"""What operators and the clients of other services expect of `ettin-serve`, over real connections."""

import http.server
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from service import Service, Stub, ask_app
from support import rewrite, wait_until

from ettin.artifacts.errors import MissingDependency, UsageError
from ettin.runtimes import LongDocuments, load
from ettin.runtimes.arguments import sigmoid
from ettin.runtimes.commands.serve import command
from ettin.runtimes.serving.app import create_app
from ettin.runtimes.serving.traces import Traces

ROOT = Path(__file__).parents[2]
Artifacts = dict[tuple[str, str], Path]
QUERY = "which planet is red"
FILLER = "The harvest was poor that year, and nobody in the village spoke of it. "
TEXTS = ["Venus", FILLER * 12 + "Mars is called the red planet. " + FILLER * 12, "Mars is red.", FILLER * 20]
FIRST, SECOND = "ettin-reranker-demo-onnx-fp32", "ettin-reranker-demo-openvino-fp32"
FIT = {"brier": 0.1, "expected_calibration_error": 0.1}
CALIBRATION = {"slope": 0.25, "offset": -1.5, "pairs": 100, "relevant": 50, "before": FIT, "after": FIT}
LENGTH = 64


class Collector(http.server.ThreadingHTTPServer):
    """Receives spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                message = trace_service.ExportTraceServiceRequest.FromString(body)
                for resource in message.resource_spans:
                    for scope in resource.scope_spans:
                        self.server.spans += scope.spans  # type: ignore[attr-defined]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def service(
    demo_artifacts: Artifacts, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    calibrated = tmp_path_factory.mktemp("calibrated") / "artifact"
    shutil.copytree(demo_artifacts["onnx", "fp32"], calibrated)
    rewrite(calibrated, lambda fields: fields.update(score_calibration=CALIBRATION))
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    options = ("--max-length", LENGTH, "--cached-scores", 50, "--traces", url, "--name", "alias", "--threads", 1)
    with Service(calibrated, demo_artifacts["openvino", "fp32"], *options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(demo_artifacts: Artifacts) -> dict[str, np.ndarray]:
    pairs = [(QUERY, text) for text in TEXTS]
    with load(demo_artifacts["onnx", "fp32"], max_length=LENGTH) as runtime:
        return {
            "truncate": runtime.predict(pairs),
            "chunks": runtime.predict(pairs, long_documents="chunks"),
            "mean": runtime.predict(pairs, long_documents=LongDocuments("chunks", 10, 3)),
            "ten": runtime.predict(pairs, long_documents=LongDocuments(max_tokens_per_doc=10)),
        }


def ask(service: Service, route: str = "/rerank", **body: object) -> httpx.Response:
    answer = service.http.post(route, json={"query": QUERY, **body})
    assert answer.status_code == 200, answer.text
    return answer


def logits(answer: httpx.Response) -> np.ndarray:
    hits = answer.json() if isinstance(answer.json(), list) else answer.json()["results"]
    return np.array(
        [hit.get("score", hit.get("relevance_score")) for hit in sorted(hits, key=lambda hit: hit["index"])]
    )


# What clients really send: captured from LiteLLM 1.110, langchain-cohere 0.6 and cohere-haystack 11.

BODIES = {
    "LiteLLM huggingface": (
        "/rerank",
        {"raw_scores": False, "truncation_direction": "Right", "top_n": 1, "texts": TEXTS, "return_text": True},
    ),
    "LiteLLM infinity": ("/rerank", {"model": "alias", "documents": TEXTS, "return_documents": True}),
    "LiteLLM hosted_vllm": (
        "/rerank",
        {"model": "alias", "documents": TEXTS, "return_documents": True, "max_tokens_per_doc": 10},
    ),
    "LiteLLM jina_ai": ("/v1/rerank", {"model": "alias", "top_n": 1, "documents": TEXTS, "return_documents": False}),
    "LangChain": ("/v2/rerank", {"model": "alias", "documents": TEXTS, "top_n": 2, "max_tokens_per_doc": None}),
    "Haystack": ("/v2/rerank", {"model": "alias", "documents": TEXTS, "top_n": 10, "max_tokens_per_doc": 4096}),
}


@pytest.mark.parametrize("client", BODIES)
def test_bodies_of_clients(service: Service, expected: dict[str, np.ndarray], client: str) -> None:
    route, body = BODIES[client]
    answer = ask(service, route, **body)
    hits = answer.json() if "texts" in body else answer.json()["results"]
    values = sigmoid(expected["ten" if body.get("max_tokens_per_doc") == 10 else "truncate"])
    order = np.argsort(-values, kind="stable")[: body.get("top_n")]
    assert [hit["index"] for hit in hits] == order.tolist()
    scores = [hit["score" if "texts" in body else "relevance_score"] for hit in hits]
    np.testing.assert_allclose(scores, values[order], rtol=1e-4)
    if "texts" in body:
        assert [hit["text"] for hit in hits] == [TEXTS[index] for index in order]
    elif body.get("return_documents"):
        assert [hit["document"] for hit in hits] == [{"text": TEXTS[index]} for index in order]
    else:
        assert not any("document" in hit for hit in hits)


# Long documents.


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("truncate", {}),
        ("chunks", {"long_documents": "chunks"}),
        ("mean", {"long_documents": "chunks", "chunk_overlap": 10, "top_chunks": 3}),
        ("ten", {"max_tokens_per_doc": 10}),
    ],
)
@pytest.mark.parametrize("texts", ["texts", "documents"])
def test_long_documents(
    service: Service, expected: dict[str, np.ndarray], name: str, body: dict[str, object], texts: str
) -> None:
    answer = ask(service, raw_scores=True, **{texts: TEXTS}, **body)
    np.testing.assert_allclose(logits(answer), expected[name], atol=1e-4)
    cut = name in ("truncate", "ten")
    assert answer.headers.get("x-truncated-documents") == ("1, 3" if cut else None)
    if texts == "documents":
        text = "some tokens of these documents or of their query were not scored: 1, 3"
        assert answer.json()["meta"].get("warnings") == ([text] if cut else None)


def test_many_truncated_documents_are_a_short_header(service: Service) -> None:
    answer = ask(service, texts=[f"{number} {FILLER * 6}" for number in range(130)])
    value = answer.headers["x-truncated-documents"]
    assert value.startswith("0, 1, 2, ") and value.endswith(" 99 and 30 more")


@pytest.mark.parametrize("field", ["top_n", "max_tokens_per_doc", "top_chunks", "chunk_overlap"])
def test_numbers_out_of_range(service: Service, field: str) -> None:
    answer = service.http.post("/rerank", json={"query": QUERY, "texts": ["a"], field: -1})
    assert answer.status_code == 422 and answer.json()["error"].startswith(f"{field}: Input should be greater than")


# Several artifacts, and calibrated scores.


def test_model_chooses_the_artifact(service: Service) -> None:
    for name, served in ((None, FIRST), ("alias", FIRST), (FIRST, FIRST), (SECOND, SECOND)):
        model = {} if name is None else {"model": name}
        assert ask(service, documents=TEXTS, **model).json()["model"] == served
    answer = service.http.post("/v2/rerank", json={"model": "rerank-3", "query": "q", "documents": ["a"]})
    assert answer.status_code == 404
    assert answer.json()["message"] == f"model 'rerank-3' is not served here, which has: {FIRST}, {SECOND}, alias"
    assert service.http.get("/info").json()["models"] == [FIRST, SECOND, "alias"]


def test_calibrated_scores(service: Service, expected: dict[str, np.ndarray]) -> None:
    found = logits(ask(service, texts=TEXTS, activation="calibrated"))
    np.testing.assert_allclose(found, sigmoid(0.25 * expected["truncate"] - 1.5), rtol=1e-4)
    body = {"query": QUERY, "texts": TEXTS, "activation": "calibrated", "model": SECOND}
    answer = service.http.post("/rerank", json=body)
    assert answer.status_code == 422 and f"'{SECOND}' has no calibration" in answer.json()["error"]


def test_commands_that_make_no_sense(demo_artifacts: Artifacts) -> None:
    artifact = str(demo_artifacts["onnx", "fp32"])
    done = CliRunner().invoke(command, [artifact, artifact, "--port", "0"])
    assert isinstance(done.exception, UsageError) and "two models have the same name: " in str(done.exception)
    done = CliRunner().invoke(command, [artifact, "--port", "0", "--activation", "calibrated"])
    assert str(done.exception) == f"--activation: no calibration in {FIRST}. Run first: ettin-calibrate"
    done = CliRunner().invoke(command, [artifact, "--port", "0", "--traces", "localhost:4318"])
    assert str(done.exception).startswith("--traces is 'localhost:4318', expected a URL")


# Ids of requests, metrics, traces, the cache, and the page.


@pytest.mark.parametrize("sent", ["abc-123._X", "a" * 128])
def test_request_id_is_kept(service: Service, sent: str) -> None:
    answer = service.http.post("/rerank", json={"query": "q", "texts": ["a"]}, headers={"X-Request-Id": sent})
    assert answer.headers["x-request-id"] == sent
    wait_until(lambda: f'"id": "{sent}"' in service.log(), 10)  # the line is written after the answer
    assert "pairs were truncated" not in service.log()  # the header says it to the client


@pytest.mark.parametrize("sent", [b"", b"a b", b"\xff", b'"}', b"a" * 129, b"a\tb"])
def test_request_id_that_is_not_well_formed(service: Service, sent: bytes) -> None:
    answer = service.http.get("/info", headers=[(b"X-Request-Id", sent)])
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def figures(service: Service) -> dict[str, float]:
    lines = service.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_cache(service: Service) -> None:
    texts = [f"a text of its own {number}" for number in range(30)]
    before = figures(service)
    first = ask(service, texts=texts, model=SECOND).json()
    assert ask(service, texts=texts, model=SECOND).json() == first
    after = figures(service)

    def added(name: str, model: str) -> float:
        return after[f'ettin_{name}_total{{model="{model}"}}'] - before[f'ettin_{name}_total{{model="{model}"}}']

    assert added("cache_hits", SECOND) == added("cache_misses", SECOND) == added("pairs", SECOND) == 30
    other = logits(ask(service, texts=texts))  # nothing crosses from one artifact to another
    assert (
        figures(service)[f'ettin_pairs_total{{model="{FIRST}"}}'] == after[f'ettin_pairs_total{{model="{FIRST}"}}'] + 30
    )
    np.testing.assert_allclose(other, [hit["score"] for hit in sorted(first, key=lambda h: h["index"])], atol=1e-4)


def test_dashboard_shows_metrics_that_exist(service: Service) -> None:
    ask(service, texts=TEXTS)
    names = {name.partition("{")[0] for name in figures(service)}
    labels = set(re.findall(r'[{,](\w+)="', service.http.get("/metrics").text)) | {"instance"}
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    shown: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            shown |= set(re.findall(r"\bettin_\w+", target["expr"]))
            assert set(re.findall(r'[{,]\s*(\w+)[=!]~?"', target["expr"])) <= labels
            for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
                assert {label.strip() for label in group.split(",")} <= labels
    assert shown <= names, shown - names
    own = {re.sub("_(bucket|count|sum)$", "", name) for name in names if not name.endswith("_created")}
    assert own <= {re.sub("_(bucket|count|sum)$", "", name) for name in shown}, "a metric that no panel shows"
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_traces(service: Service, collector: Collector) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = {"traceparent": parent, "X-Request-Id": "traced"}
    texts = [f"a text for the trace {number}" for number in range(5)]
    service.http.post("/rerank", json={"query": QUERY, "texts": texts}, headers=headers).raise_for_status()
    service.http.post("/rerank", json={"query": QUERY}, headers={"X-Request-Id": "refused"})

    def span(identifier: str) -> Any:
        return next((s for s in collector.spans if facts(s)["ettin.id"] == identifier), None)

    def facts(span: Any) -> dict[str, Any]:
        return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}

    wait_until(lambda: span("traced") is not None and span("refused") is not None, 30)
    found = span("traced")
    assert found.name == "POST /rerank" and found.trace_id.hex() == parent[3:35]
    assert found.parent_span_id.hex() == parent[36:52] and found.kind == 2
    values = facts(found)
    assert values["ettin.documents"] == 5 and values["ettin.status"] == 200 and values["ettin.model"] == FIRST
    assert 0 < values["ettin.engine_ms"] <= values["ettin.ms"] and 0 < values["ettin.queue_ms"] <= values["ettin.ms"]
    assert (found.end_time_unix_nano - found.start_time_unix_nano) / 1e6 == pytest.approx(values["ettin.ms"], abs=0.1)
    assert not span("refused").parent_span_id and facts(span("refused"))["ettin.status"] == 422
    assert all(span.name not in ("GET /health", "GET /metrics") for span in collector.spans)
    assert not any("text" in str(value) for span in collector.spans for value in facts(span).values())


def test_a_collector_that_is_absent_delays_nothing(demo_artifacts: Artifacts) -> None:
    with Service(demo_artifacts["onnx", "fp32"], "--traces", "http://127.0.0.1:9/v1/traces") as service:
        for _ in range(3):
            assert service.http.post("/rerank", json={"query": "q", "texts": ["a"]}, timeout=5).status_code == 200
        service.stop()  # which has a time limit of its own


def test_traces_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingDependency, match=r'opentelemetry.sdk.trace, .*"ettin-export\[otel\]"'):
        Traces("http://localhost:4318/v1/traces")


def test_page_loads_nothing() -> None:
    answer = ask_app(Stub(), lambda client: client.get("/docs"))
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"<script|<link|<img|@import|https?://", answer.text)
    for text in ("POST /v2/rerank", "GET /health/live", "max_tokens_per_doc", "RerankResponse", "list of string"):
        assert text in answer.text, text
    app = create_app({"stub": Stub()})
    assert all(path in answer.text for path in app.openapi()["paths"])
    assert ask_app(Stub(), lambda client: client.get("/redoc")).status_code == 404


def test_page_shows_no_markup_of_others() -> None:
    from ettin.runtimes.serving.page import page

    info = {"title": "<b>", "version": "<i>"}
    field = {"type": "string", "description": "<img src=x>"}
    openapi = {"info": info, "paths": {}, "components": {"schemas": {"<u>": {"properties": {"<a>": field}}}}}
    assert not re.search("<(b|i|img|u|a)[ >]", page(openapi).replace("<a href=openapi.json>", ""))
