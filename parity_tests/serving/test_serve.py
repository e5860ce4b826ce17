"""`ettin-serve`: the routes, their clients, limits, faults and its end, over real connections."""

import asyncio
import gc
import importlib.util
import json
import logging
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from service import Service, Stub, ask_app

from ettin.artifacts.errors import Busy, Closed, InputError, ServerError
from ettin.runtimes import Runtime, load
from ettin.runtimes.arguments import sigmoid
from ettin.runtimes.commands.serve import command
from ettin.runtimes.serving.backends import TritonBackend
from ettin.runtimes.triton.repository import TritonOptions, publish
from ettin.runtimes.triton.server import TritonServer

Artifacts = dict[tuple[str, str], Path]
QUERY = "Which planet is red?"
TEXTS = ["Venus", "Mars is the red planet.", "", "Nobody knows " * 90]
NAME = "ettin-reranker-demo-onnx-fp32"
MODEL = f'{{model="{NAME}"}}'
IDLE = f"ettin_waiting_pairs{MODEL} 0.0"


@pytest.fixture(scope="module")
def service(demo_artifacts: Artifacts) -> Iterator[Service]:
    options = ("--max-body-mib", 1, "--max-documents", 500, "--max-waiting-pairs", 5000, "--name", "rerank-alias")
    with Service(demo_artifacts["onnx", "fp32"], *options) as running:
        yield running


@pytest.fixture(scope="module")
def runtime(demo_artifacts: Artifacts) -> Iterator[Runtime]:
    with load(demo_artifacts["onnx", "fp32"]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(runtime: Runtime) -> np.ndarray:
    return np.asarray(runtime.predict([(QUERY, text) for text in TEXTS]))


# The routes.


@pytest.mark.parametrize("raw", [True, False])
def test_tei_route(service: Service, expected: np.ndarray, raw: bool) -> None:
    body = {"query": QUERY, "texts": TEXTS, "raw_scores": raw, "return_text": raw, "truncate": True}
    hits = service.http.post("/rerank", json=body).raise_for_status().json()
    order = np.argsort(-expected, kind="stable")
    assert [hit["index"] for hit in hits] == order.tolist()
    values = expected if raw else sigmoid(expected)
    np.testing.assert_allclose([hit["score"] for hit in hits], values[order], rtol=1e-4)
    assert [hit.get("text") for hit in hits] == ([TEXTS[index] for index in order] if raw else [None] * 4)


@pytest.mark.parametrize("version", ["1", "2"])
def test_jina_and_cohere_route(service: Service, runtime: Runtime, expected: np.ndarray, version: str) -> None:
    documents = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
    body = {"model": "rerank-alias", "query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
    answer = service.http.post(f"/v{version}/rerank", json=body).raise_for_status().json()
    order = np.argsort(-expected, kind="stable")[:2]
    assert [hit["index"] for hit in answer["results"]] == order.tolist()
    scores = [hit["relevance_score"] for hit in answer["results"]]
    np.testing.assert_allclose(scores, sigmoid(expected[order]), rtol=1e-4)
    assert [hit["document"]["text"] for hit in answer["results"]] == [TEXTS[index] for index in order]
    pairs = runtime.tokenizer.pairs([(QUERY, text) for text in TEXTS], 7999)
    assert answer["usage"]["total_tokens"] == sum(map(len, pairs))
    assert answer["model"] == NAME and answer["meta"]["api_version"]["version"] == version


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_cohere_client(service: Service, expected: np.ndarray) -> None:
    cohere = pytest.importorskip("cohere")
    address = str(service.http.base_url)
    for client in (cohere.Client("key", base_url=address), cohere.ClientV2("key", base_url=address)):
        answer = client.rerank(model=NAME, query=QUERY, documents=TEXTS, top_n=3)
        assert [hit.index for hit in answer.results] == np.argsort(-expected, kind="stable")[:3].tolist()
        assert answer.results[0].relevance_score == pytest.approx(float(sigmoid(expected.max())), rel=1e-4)
    del client
    gc.collect()  # it leaves its connections open


def test_nothing_to_rank(service: Service) -> None:
    assert service.http.post("/rerank", json={"query": "q", "texts": []}).json() == []
    assert service.http.post("/v1/rerank", json={"query": "q", "documents": []}).json()["results"] == []


def test_what_is_served(service: Service) -> None:
    info = service.http.get("/info").json()
    assert info["model_id"] == NAME and info["max_input_length"] == 7999 and "ONNX Runtime" in info["runtime"]
    routes = service.http.get("/openapi.json").json()["paths"]
    assert {"/rerank", "/v1/rerank", "/v2/rerank", "/health", "/info"} <= routes.keys()


def figures(service: Service) -> dict[str, float]:
    lines = service.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics(service: Service) -> None:
    before = figures(service)
    service.http.post("/rerank", json={"query": QUERY, "texts": TEXTS}).raise_for_status()
    after = figures(service)
    assert (
        after['ettin_requests_total{route="/rerank",status="200"}'] >= 1 and after[f"ettin_waiting_pairs{MODEL}"] == 0
    )

    def added(name: str) -> float:
        return after[f"ettin_{name}{MODEL}"] - before.get(f"ettin_{name}{MODEL}", 0.0)

    assert added("documents_total") == added("pairs_total") == added("batch_pairs_sum") == len(TEXTS)
    assert added("tokens_total") == added("batch_tokens_sum") > 100
    assert added("batches_total") == added("engine_seconds_count") >= 1 and added("wait_seconds_count") == 1
    assert added("engine_seconds_sum") > 0 and added("cache_misses_total") == 0


# Many clients.


def test_clients_get_their_own(service: Service, runtime: Runtime) -> None:
    requests = [
        (
            f"query {index}",
            [f"text {index} {number} " + "word " * ((index * 7 + number * 13) % 90) for number in range(count)],
        )
        for index, count in enumerate([1, 60, 1, 9] * 12)
    ]

    def ask(request: tuple[str, Sequence[str]]) -> list[float]:
        body = {"query": request[0], "texts": request[1], "raw_scores": True}
        hits = service.http.post("/rerank", json=body).raise_for_status().json()
        return [hit["score"] for hit in sorted(hits, key=lambda hit: int(hit["index"]))]

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, requests))
    for (query, texts), scores in zip(requests, answers, strict=True):
        np.testing.assert_allclose(scores, runtime.predict([(query, text) for text in texts]), atol=1e-4)


def test_a_client_that_hangs_up(service: Service) -> None:
    body = json.dumps({"query": "q", "texts": ["word " * 300] * 490}).encode()
    head = f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.3)
    deadline = time.monotonic() + 20
    while IDLE not in service.http.get("/metrics").text and time.monotonic() < deadline:
        time.sleep(0.05)
    text = service.http.get("/metrics").text
    assert IDLE in text and 'ettin_requests_total{route="/rerank",status="499"} 1.0' in text


# What is refused.

BAD = {
    "no texts": ({"query": "q"}, 422, "expected 'documents' or 'texts', one of them"),
    "both kinds": ({"query": "q", "texts": [], "documents": []}, 422, "or 'texts', one of them"),
    "a number": ({"query": "q", "texts": ["a", 3]}, 422, "texts.1: Input should be a valid string"),
    "an unknown key": ({"query": "q", "texts": [], "top_k": 3}, 422, "top_k: Extra inputs are not permitted"),
    "cut at the left": ({"query": "q", "texts": [], "truncation_direction": "Left"}, 422, "truncation_direction: "),
    "half a character": (b'{"query": "\\ud800", "texts": ["a"]}', 422, "the body is not JSON ("),
    "half a body": (b'{"query": ', 422, "the body is not JSON (EOF"),
    "no UTF-8": (b'{"query": "\xff", "texts": ["a"]}', 422, "the body is not JSON in UTF-8"),
    "many documents": ({"query": "q", "texts": ["a"] * 501}, 413, "501 documents, limit 500"),
    "a large body": ({"query": "q", "texts": ["a" * (1 << 20)]}, 413, "the request is larger than 1048576 bytes"),
    "a long text": (
        {"query": "q", "texts": ["a", "b " * 9000], "truncate": False},
        413,
        "document 1 has, with its query, more than 7999 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_said(service: Service, case: str) -> None:
    body, status, message = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = service.http.post("/rerank", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and message in answer.json()["error"], answer.text
    assert answer.json()["message"] == answer.json()["error"] and answer.json()["error_type"] == "validation"


def test_large_body_without_its_length(service: Service) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * (1 << 16)

    try:
        answer = service.http.post("/rerank", content=parts())
        assert answer.status_code == 413
    except httpx.TransportError:
        pass  # closed while it was still sending
    assert service.http.get("/health").status_code == 200


def test_another_model_is_not_this_one(service: Service) -> None:
    answer = service.http.post("/v1/rerank", json={"model": "rerank-3", "query": "q", "documents": ["a"]})
    assert answer.status_code == 404
    assert answer.json()["message"] == f"model 'rerank-3' is not served here, which has: {NAME}, rerank-alias"


REQUEST = {"query": "secret query", "texts": ["secret text"]}


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Busy("900 pairs are waiting, limit 800", 7.2), 429, "overloaded"),
        (Closed("the server is stopping"), 503, "overloaded"),
    ],
)
def test_faults_have_a_status(error: Exception, status: int, kind: str) -> None:
    answer = ask_app(Stub(error), lambda client: client.post("/rerank", json=REQUEST))
    assert answer.status_code == status and answer.json()["error_type"] == kind
    assert str(error) in answer.json()["error"]
    assert answer.headers.get("retry-after") == ({429: "7", 503: "5"}.get(status))


@pytest.mark.parametrize(("error", "status"), [(ServerError("Triton: /secret"), 502), (RuntimeError("/secret"), 500)])
def test_internal_reasons_are_for_the_log(error: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    answer = ask_app(Stub(error), lambda client: client.post("/rerank", json=REQUEST))
    assert answer.status_code == status and answer.json()["error_type"] == "backend"
    assert "secret" not in answer.text
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "ettin.serve"]
    assert line["id"] == answer.headers["x-request-id"] and line["id"] in answer.json()["error"]
    assert "/secret" in line["error"] and "score" in line["trace"]


def test_health_of_a_model_that_is_not_ready() -> None:
    assert ask_app(Stub(ready=False), lambda client: client.get("/health")).status_code == 503


@pytest.mark.parametrize(
    ("header", "status"), [("Bearer right", 200), ("Bearer wrong", 401), ("right", 401), ("", 401)]
)
def test_api_key(header: str, status: int) -> None:
    sent = {"Authorization": header} if header else {}
    answer = ask_app(Stub(), lambda client: client.post("/rerank", json=REQUEST, headers=sent), key="right")
    assert answer.status_code == status
    for route in ("/health", "/metrics"):
        assert ask_app(Stub(), lambda client, route=route: client.get(route), key="right").status_code == 200
    assert ask_app(Stub(), lambda client: client.get("/info"), key="right").status_code == 401


def test_access_log_has_no_texts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ettin.access"):
        ask_app(Stub(), lambda client: client.post("/rerank?key=secret", json=REQUEST))
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "ettin.access"]
    assert line.pop("ms") >= 0 and len(line.pop("id")) == 32
    facts = {"method": "POST", "path": "/rerank", "status": 200, "model": "stub", "documents": 1, "tokens": 1}
    assert line == facts


# The process.


def test_stop_finishes_what_was_asked(demo_artifacts: Artifacts) -> None:
    with Service(demo_artifacts["onnx", "fp32"], "--threads", 1) as service, ThreadPoolExecutor(1) as pool:
        body = {"query": "q", "texts": ["word " * 200] * 300}
        asked = pool.submit(service.http.post, "/rerank", json=body)
        time.sleep(0.3)
        log = service.stop()
        assert len(asked.result(30).json()) == 300
    assert service.process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert '"status": 200, ' in log and "word" not in log


def test_port_in_use_is_one_line(demo_artifacts: Artifacts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(command, [str(demo_artifacts["onnx", "fp32"]), "--port", str(port)])
    assert isinstance(done.exception, ServerError) and f"can't listen on 127.0.0.1:{port}" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected an ARTIFACT or --triton HOST:PORT, one of them"),
        (["somewhere", "--triton", "localhost:1"], "expected an ARTIFACT or --triton HOST:PORT, one of them"),
        (["somewhere", "--port", "0"], "somewhere: no such folder"),
        (["somewhere", "--port", "0", "--api-key-file", "{empty}"], "is empty"),
        (["somewhere", "--port", "0", "--api-key-file", "{binary}"], "is not text"),
        (["somewhere", "--port", "0", "--api-key-file", "."], "is a directory"),
        (["somewhere", "--model", "m"], "--model is for --triton"),
        (["--triton", "h:1", "--threads", "2", "--key", "k"], "--key, --threads: for an ARTIFACT, not for --triton"),
        (["--triton", "h:1", "--cached-scores", "9"], "--cached-scores: for an ARTIFACT, not for --triton"),
        (["--triton", "127.0.0.1:1", "--port", "0"], "Triton at 127.0.0.1:1 does not answer"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    names = {name: tmp_path / name for name in ("empty", "binary")}
    done = CliRunner().invoke(command, [argument.format(**names) for argument in arguments])
    assert message in f"{done.exception} {done.output}"


@pytest.mark.triton
@pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason='needs pip install "ettin-export[triton]"')
def test_gateway_to_triton(demo_artifacts: Artifacts, tmp_path: Path, expected: np.ndarray) -> None:
    artifact = demo_artifacts["onnx", "fp32"]
    for name in ("one", "two"):
        publish(artifact, tmp_path, name, TritonOptions())
    with TritonServer(tmp_path) as server:
        address = f"127.0.0.1:{server.grpc_port}"
        done = CliRunner().invoke(command, ["--triton", address, "--port", "0"])
        assert f"Triton at {address} has 2 rerankers (one, two). Choose: --model NAME" in str(done.exception)
        with Service("--triton", address, "--model", "two") as service:
            hits = service.http.post("/rerank", json={"query": QUERY, "texts": TEXTS, "raw_scores": True}).json()
            np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(expected)[::-1], atol=1e-4)
            answer = service.http.post("/v1/rerank", json={"query": QUERY, "documents": TEXTS}).json()
            assert answer["model"] == "two" and answer["usage"]["total_tokens"] > 100
            server.stop()
            assert service.http.get("/health").status_code == 503
            answer = service.http.post("/rerank", json={"query": QUERY, "texts": TEXTS})
            assert answer.status_code == 429 and "Triton" in answer.json()["error"]


# A gateway, with a stand-in of Triton's client.


class TritonStandIn:
    """A module like `tritonclient.grpc.aio` whose server has one model, which truncates every document."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, str]] = []
        self.is_cached = False
        self.model_version = "1"
        self.asked: list[str] = []  # versions whose configuration was asked for

    def InferenceServerClient(self, _: str) -> "TritonStandIn":  # noqa: N802
        return self

    class InferInput:
        def __init__(self, *_: object) -> None: ...

        def set_data_from_numpy(self, _: object) -> None: ...

    async def infer(self, _: str, __: object, parameters: dict[str, str]) -> "TritonStandIn":
        self.parameters.append(parameters)
        return self

    def get_response(self) -> "TritonStandIn":
        return self

    def as_numpy(self, name: str) -> np.ndarray:
        return np.ones((1, 1), {"scores": np.float32, "tokens": np.int32, "truncated": np.bool_}[name])

    async def is_model_ready(self, _: str, client_timeout: float | None = None) -> bool:
        await asyncio.sleep(3600 if client_timeout is None else 0)  # the real one raises then
        raise TimeoutError

    async def get_model_config(self, _: str, version: str = "", **__: object) -> dict[str, Any]:
        self.asked.append(version)
        return {"config": {"response_cache": {"enable": self.is_cached}}}

    async def close(self) -> None: ...


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> tuple[TritonStandIn, TritonBackend]:
    stand_in = TritonStandIn()
    monkeypatch.setattr("ettin.runtimes.serving.backends._triton_client", lambda: (stand_in, TimeoutError))
    return stand_in, TritonBackend("host:1", "model")


def test_gateway_passes_what_a_client_says(triton: tuple[TritonStandIn, TritonBackend]) -> None:
    """Even if it is the default: the model may have been published with others."""
    stand_in, backend = triton
    for fields in ({}, {"long_documents": "truncate", "top_chunks": 1}):
        ask_app(backend, lambda client, fields=fields: client.post("/rerank", json={**REQUEST, **fields}))
    assert stand_in.parameters == [{}, {"long_documents": "truncate", "top_chunks": "1"}]


def test_gateway_refuses_parameters_that_a_cache_ignores(triton: tuple[TritonStandIn, TritonBackend]) -> None:
    triton[0].is_cached = True
    answer = ask_app(triton[1], lambda client: client.post("/rerank", json={**REQUEST, "top_chunks": 2}))
    assert answer.status_code == 422 and "Leave out top_chunks, or publish" in answer.json()["error"]
    assert ask_app(triton[1], lambda client: client.post("/rerank", json=REQUEST)).status_code == 200


def test_gateway_asks_for_the_configuration_of_a_version_once(
    triton: tuple[TritonStandIn, TritonBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new version that has a cache is noticed at its first answer, a change in place after some seconds."""
    stand_in, backend = triton
    now_s = [1000.0]
    monkeypatch.setattr("ettin.runtimes.serving.backends.time", SimpleNamespace(monotonic=lambda: now_s[0]))

    def ask() -> None:
        asyncio.run(backend.score("q", ["d"], {"top_chunks": 2}))

    ask()
    ask()
    assert stand_in.asked == ["1"]
    stand_in.model_version, stand_in.is_cached = "2", True
    for _ in range(2):
        with pytest.raises(InputError, match="a cache that ignores parameters. Leave out top_chunks"):
            ask()
    assert stand_in.asked == ["1", "2"]
    stand_in.is_cached = False
    now_s[0] += 6
    ask()
    assert stand_in.asked == ["1", "2", "2"]
    asyncio.run(backend.score("q", ["d"], {}))
    assert stand_in.asked == ["1", "2", "2"]


def test_gateway_refuses_a_truncated_answer_from_a_cache(triton: tuple[TritonStandIn, TritonBackend]) -> None:
    """Triton's response cache does not look at parameters."""
    answer = ask_app(triton[1], lambda client: client.post("/rerank", json={**REQUEST, "truncate": False}))
    assert answer.status_code == 413 and "truncat" in answer.json()["error"]


def test_gateway_does_not_wait_for_a_triton_that_hangs(triton: tuple[TritonStandIn, TritonBackend]) -> None:
    assert not asyncio.run(asyncio.wait_for(triton[1].is_ready(), 20))


def test_gateway_has_no_calibration(triton: tuple[TritonStandIn, TritonBackend]) -> None:
    answer = ask_app(triton[1], lambda client: client.post("/rerank", json={**REQUEST, "activation": "calibrated"}))
    assert answer.status_code == 422 and "behind Triton" in answer.json()["error"]
    done = CliRunner().invoke(
        command, ["--triton", "host:1", "--model", "m", "--activation", "calibrated", "--port", "0"]
    )
    assert "--activation calibrated" in str(done.exception) and "--triton" in str(done.exception)
