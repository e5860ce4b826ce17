"""`ettin-serve` under hostile and unlucky clients, with low limits so that the attacks are quick."""

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from campaign_http import (
    HEAD,
    HOSTILE_SHAPES,
    Address,
    hold_half_bodies,
    hold_idle_connections,
    hostile_body,
    mix_load,
    read_answers_slowly,
    send_hostile_bodies,
    send_slow_bodies,
)
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import Service, Stub, ask_app

from ettin.artifacts.errors import UsageError
from ettin.runtimes import load
from ettin.runtimes.commands.serve import command
from ettin.runtimes.request import Scored
from ettin.runtimes.serving import server
from ettin.runtimes.serving.app import create_app
from ettin.runtimes.serving.bodies import parsed
from ettin.runtimes.serving.gate import Health
from ettin.runtimes.serving.limits import BACKLOG, Limits
from ettin.runtimes.serving.messages import Refused

Artifacts = dict[tuple[str, str], Path]
KIND = {"Content-Type": "application/json"}
MEMORY_MIB = 100  # that may be kept after an attack
OPTIONS = ("--max-connections", 40, "--header-timeout-s", 2, "--body-timeout-s", 2, "--max-body-mib", 4,
           "--total-body-mib", 16, "--max-length", 64, "--threads", 1)  # fmt: skip


@pytest.fixture(scope="module")
def service(demo_artifacts: Artifacts) -> Iterator[Service]:
    with Service(demo_artifacts["onnx", "fp32"], *OPTIONS, open_files=300) as running:
        yield running


@pytest.fixture(scope="module")
def address(service: Service) -> Address:
    return "127.0.0.1", service.port


@pytest.fixture(autouse=True)
def memory_returns(request: pytest.FixtureRequest) -> Iterator[None]:
    if "address" not in request.fixturenames:
        yield
        return
    running = request.getfixturevalue("service")
    before = running.memory_mib()
    yield
    deadline = time.monotonic() + 20
    while running.memory_mib() > before + MEMORY_MIB and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running.memory_mib() <= before + MEMORY_MIB


# Bodies.


def test_hostile_bodies(address: Address) -> None:
    send_hostile_bodies(address, (4 << 20) - 100)


@pytest.mark.parametrize("shape", HOSTILE_SHAPES)
def test_parsing_takes_bounded_memory(shape: str) -> None:
    """Python's own objects: at most four bytes for each character of a text, and the copies of the body."""
    import tracemalloc

    size = 2 << 20
    body = hostile_body(shape, size)
    tracemalloc.start()
    try:
        parsed(body, Limits(max_documents=1000))
    except Refused as error:
        assert error.status in (413, 422) and len(str(error)) < 300
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * size


def test_half_sent_bodies(service: Service, address: Address) -> None:
    before = service.memory_mib()
    hold_half_bodies(address, 30, 4_000_000, 0.2)
    assert service.memory_mib() < before + 16 * 3 + MEMORY_MIB
    assert service.http.post("/rerank", json={"query": "q", "texts": ["a"]}).status_code == 200


def test_a_body_that_stops_is_refused_in_time(address: Address) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(HEAD.format(100).encode() + b"{")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_a_truncated_body_does_not_reach_the_application(service: Service, address: Address) -> None:
    """The bytes that arrived are valid JSON by themselves."""

    def count(sign: str) -> float:
        lines = [line for line in service.http.get("/metrics").text.splitlines() if line.startswith("ettin_requests_")]
        return sum(float(line.split()[1]) for line in lines if sign in line and "created" not in line)

    before, left = count('route="/v2/rerank"'), count('status="499"')
    content = b'{"query": "q", "documents": ["a"]}'
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(HEAD.format(len(content) + 10).encode() + content)
    deadline = time.monotonic() + 20
    while count('status="499"') == left and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count('status="499"') > left and count('route="/v2/rerank"') == before


def test_the_oldest_body_makes_room_for_others(address: Address) -> None:
    content = hostile_body("one text", 4_000_000)
    sockets = [socket.create_connection(address, timeout=20) for _ in range(6)]
    try:
        for connection in sockets:
            try:
                connection.sendall(HEAD.format(len(content)).encode() + content[:-1])
            except OSError:  # refused already
                continue
        answer = sockets[0].recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after" in answer.lower()
    finally:
        for connection in sockets:
            connection.close()


# Connections.


def test_idle_connections_are_closed(address: Address) -> None:
    with socket.create_connection(address, timeout=20) as silent, socket.create_connection(address, timeout=20) as half:
        half.sendall(b"GET /health HTTP/1.1\r\nHos")
        assert silent.recv(100) == b"" and half.recv(100) == b""


def test_more_connections_than_open_files(address: Address) -> None:
    hold_idle_connections(address, 400, 0.5)


def test_a_flood_does_not_close_a_connection_that_has_sent_its_request(service: Service, address: Address) -> None:
    """All of them wait in the system's queue, so the server accepts them before it reads from any."""
    service.process.send_signal(signal.SIGSTOP)
    with ExitStack() as stack:
        honest = stack.enter_context(socket.create_connection(address, timeout=20))
        honest.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        for _ in range(BACKLOG - 1):
            stack.enter_context(socket.create_connection(address, timeout=20))
        service.process.send_signal(signal.SIGCONT)
        assert honest.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_flood_that_goes_on_leaves_open_files(service: Service, address: Address) -> None:
    """The queue is full again whenever the server has emptied it, before it could close a connection."""
    hold_idle_connections(address, 104, 0.1)
    with ExitStack() as stack:
        for _ in range(800):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(address)
    assert service.http.get("/health").status_code == 200
    assert "out of system resource" not in service.log()


def test_slow_bodies_beyond_the_limit_of_requests(address: Address) -> None:
    send_slow_bodies(address, 90, 3)


def test_answers_that_nobody_reads(address: Address) -> None:
    read_answers_slowly(address, 5, 180, 4)


def test_memory_goes_back_when_a_client_leaves_without_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    monkeypatch.setattr(server, "give_memory_back", lambda: times.append(1))
    running = server._Server(uvicorn.Config(lambda: None), Health([Stub()], 10), 0)

    def tick(counter: int) -> int:
        asyncio.run(running.on_tick(counter))
        return len(times)

    running.server_state.connections = {object()}  # type: ignore[assignment]
    assert tick(20) == tick(21) == tick(40) == 1
    running.server_state.connections = set()
    assert tick(60) == tick(80) == 2


def test_limits_need_open_files() -> None:
    done = CliRunner().invoke(command, ["somewhere", "--max-connections", str(10**9)])
    assert isinstance(done.exception, UsageError) and "open files, the limit of this process is" in str(done.exception)


def test_no_traces_in_the_log(service: Service, address: Address) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"\x16\x03\x01 not HTTP \r\n\r\n")
        assert b"400" in connection.recv(1000)
    assert "Traceback" not in service.log() and "\x16" not in service.log()


def test_mixed_load_has_right_scores(address: Address, demo_artifacts: Artifacts) -> None:
    with load(demo_artifacts["onnx", "fp32"], max_length=64) as runtime:
        mix_load(address, lambda query, texts: runtime.predict([(query, text) for text in texts]), 40)


# Answers.


def test_errors_are_bounded_and_ascii() -> None:
    for body in (
        {"query": "q", "documents": [], "k" * 100_000: 1},
        {"query": "q", "documents": [], "model": "é" * 100_000},
        b'{"query": "q", "documents": [], "model": "\\ud800"}',
        {"query": "q", "documents": [], "model": "\x1b[31m"},
    ):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = ask_app(Stub(), lambda c, content=content: c.post("/v1/rerank", content=content, headers=KIND))
        assert answer.status_code in (404, 422) and len(answer.content) < 3000 and answer.content.isascii()


def test_a_wrong_method_is_told_the_right_one() -> None:
    answer = ask_app(Stub(), lambda client: client.get("/rerank"))
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"


def test_a_log_line_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ettin.access"):
        ask_app(Stub(), lambda client: client.get("/a%0ab%1b[31m" + "c" * 5000))
    (line,) = [record.message for record in caplog.records if record.name == "ettin.access"]
    assert "\n" not in line and "\x1b" not in line and len(line) < 500 and json.loads(line)["path"].startswith("/a\nb")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "q", "texts": ["a" * 101]}, "document 0: 101 characters, limit 100"),
        ({"query": "a" * 101, "texts": []}, "query: 101 characters, limit 100"),
        ({"query": "q", "texts": ["a" * 90] * 3}, "271 characters in all texts, limit 200"),
        ({"query": "q", "texts": ["a"] * 6}, "6 documents, limit 5"),
        ({"query": "q", "texts": [""] * 1000}, "more texts than in 5 documents"),
    ],
)
def test_limits_of_texts(body: dict[str, object], message: str) -> None:
    limits = Limits(max_documents=5, max_text_characters=100, max_request_characters=200)
    answer = ask_app(Stub(), lambda client: client.post("/rerank", json=body), limits)
    assert answer.status_code == 413 and message in answer.json()["error"]


def test_a_body_counts_until_its_error_is_sent() -> None:
    """A client that does not read its errors must not get memory that nobody counts."""
    app, body, counted = create_app({"stub": Stub()}), b'{"query": 1}', []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: object) -> None:
        counted.append(app.state.bodies._held_bytes)

    scope = {"type": "http", "method": "POST", "path": "/rerank", "query_string": b"", "http_version": "1.1",
             "headers": [(b"content-type", b"application/json")]}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert counted == [len(body)] * 2 and app.state.bodies._held_bytes == 0


@pytest.mark.parametrize("indent", [None, 8])
@pytest.mark.parametrize("as_objects", [True, False])
def test_good_requests_pass_the_limits(indent: int | None, as_objects: bool) -> None:
    texts = ['\\"quoted\\\\" é 😀 ' * 40] * 10_000
    documents = [{"text": text} for text in texts] if as_objects else texts
    body = json.dumps({"query": '"', "documents": documents}, indent=indent, ensure_ascii=False).encode()
    assert parsed(body, Limits()).passages == texts


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=12,
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        key: JSON | values
        for key, values in {
            "query": st.text(),
            "documents": st.lists(st.text() | st.fixed_dictionaries({"text": st.text()}), max_size=6),
            "model": st.none() | st.just("stub"),
            "top_n": st.integers(),
            "return_documents": st.booleans(),
            "texts": st.none() | st.lists(st.text(), max_size=3),
            "activation": st.sampled_from(["sigmoid", "calibrated"]),
            "long_documents": st.sampled_from(["truncate", "chunks"]),
            **dict.fromkeys(("max_tokens_per_doc", "chunk_overlap", "top_chunks"), st.integers()),
            "other": JSON,
        }.items()
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(REQUESTS | JSON)
def test_any_json_is_answered(body: object) -> None:
    content = json.dumps(body).encode()
    answer = ask_app(Stub(), lambda client: client.post("/v2/rerank", content=content, headers=KIND))
    assert answer.status_code in (200, 404, 413, 422)
    if answer.status_code != 200:
        assert answer.json().keys() >= {"error", "message"}
    else:
        assert isinstance(answer.json(), list) or "results" in answer.json()


def test_the_openapi_page_is_whole() -> None:
    page = ask_app(Stub(), lambda client: client.get("/openapi.json")).json()
    text = json.dumps(page)
    for name in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert name in page["components"]["schemas"]
    for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
        assert page["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]


# Health.


class StuckEngine(Stub):
    """Its probe never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.probes, self.batches = 0, 0.0

    async def probe(self) -> None:
        self.probes += 1
        await asyncio.Event().wait()

    @property
    def counters(self) -> dict[str, float]:
        return {"batches": self.batches, "waiting_pairs": 1.0}


def test_a_stuck_engine_is_not_alive() -> None:
    async def run() -> None:
        backend = StuckEngine()
        health = Health([backend], 0.2)
        with pytest.raises(Refused, match="the engine has scored nothing for"):
            for _ in range(20):
                await health.check_live()
        assert backend.probes == 1
        backend.batches += 1  # busy, not stuck
        assert health._engines[0]._silent_s() < 0.2
        with pytest.raises(Refused):
            for _ in range(20):
                await health.check_ready()

    asyncio.run(run())


def test_a_failing_engine_is_not_alive() -> None:
    class Broken(Stub):
        async def probe(self) -> None:
            raise RuntimeError("/secret")

    answer = ask_app(Broken(), lambda client: client.get("/health/live"))
    assert answer.status_code == 503 and "secret" not in answer.text
    assert ask_app(Broken(), lambda client: client.get("/health")).status_code == 200
    assert ask_app(Stub(), lambda client: client.get("/health/live")).status_code == 200


def test_health_routes_of_a_server(service: Service) -> None:
    for route in ("/health", "/health/live", "/health/ready"):
        assert service.http.get(route).status_code == 200


def test_a_draining_server_is_not_ready(demo_artifacts: Artifacts) -> None:
    with Service(demo_artifacts["onnx", "fp32"], "--drain-s", 3) as service:
        service.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while service.http.get("/health/ready").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert service.http.get("/health/ready").status_code == 503
        assert service.http.post("/rerank", json={"query": "q", "texts": ["a"]}).status_code == 200
        service.ended()


def test_health_while_all_requests_are_taken() -> None:
    """More requests than the limit: the server says so, and health checks are answered."""

    class Waiting(Stub):
        async def score(self, query: str, documents: Sequence[str], *_: object) -> Scored:
            await asyncio.sleep(1)
            return Scored(
                np.zeros(len(documents), np.float32),
                np.ones(len(documents), np.int32),
                np.zeros(len(documents), np.bool_),
            )

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        body = {"query": "q", "texts": ["a"]}
        first = asyncio.ensure_future(client.post("/rerank", json=body))
        await asyncio.sleep(0.2)
        refused = await client.post("/rerank", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert (await client.get("/health/live")).status_code == 200
        return await first

    assert ask_app(Waiting(), ask, Limits(max_connections=1)).status_code == 200


def test_truncation_is_refused_before_scoring(service: Service) -> None:
    def pairs() -> float:
        text = service.http.get("/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith("ettin_pairs_total")).split()[-1])

    before = pairs()
    body = {"query": "q", "texts": ["a", "word " * 100], "truncate": False}
    answer = service.http.post("/rerank", json=body)
    assert answer.status_code == 413 and answer.json()["error"].startswith("document 1 has, with its query, more than ")
    assert pairs() == before
    assert service.http.post("/rerank", json={**body, "truncate": True}).status_code == 200
