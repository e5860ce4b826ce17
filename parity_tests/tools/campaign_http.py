"""Attacks on a running `ettin-serve`, as functions with parameters: `make test` runs them small, a soak run large.

Every attack returns the longest time in seconds that `/health` took meanwhile, and fails if the server did not answer.
"""

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import httpx
import numpy as np

Address = tuple[str, int]
HEAD = "POST /v2/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"

# A unit that is repeated up to a size, and what is before and after it.
HOSTILE_SHAPES: dict[str, tuple[bytes, bytes, bytes]] = {
    "numbers": (b'{"query":"q","documents":[', b"1,", b"1]}"),
    "empty objects": (b'{"query":"q","documents":[', b"{},", b"{}]}"),
    "empty texts": (b'{"query":"q","documents":[', b'"",', b'""]}'),
    "texts as objects": (b'{"query":"q","documents":[', b'{"text":""},', b'{"text":""}]}'),
    "unclosed lists": (b'{"query":"q","documents":', b"[", b""),
    "unclosed objects": (b"", b'{"a":', b""),
    "one number": (b'{"query":"q","top_n":', b"9", b',"documents":[]}'),
    "repeated keys": (b"{", b'"query":"",', b'"documents":[]}'),
    "keys of an object": (b'{"query":"q","documents":[{', b'"b":1,', b'"c":1}]}'),
    "one text": (b'{"query":"q","documents":["', b"a", b'"]}'),
    "escaped quotes": (b'{"query":"q","documents":["', b'\\"', b'"]}'),
    "escaped characters": (b'{"query":"q","documents":["', b"\\u00e9", b'"]}'),
    "wide characters": (b'{"query":"q","documents":["\xf0\x9f\x98\x80', b"a", b'"]}'),
    "blanks": (b'{"query":"q","documents":[', b" ", b"]}"),
    "a key": (b'{"query":"q","documents":[],"', b"k", b'":1}'),
    "not a number": (b'{"query":"q","documents":[', b"NaN,", b"NaN]}"),
}


def hostile_body(shape: str, size_bytes: int) -> bytes:
    """A body of about this size."""
    before, unit, after = HOSTILE_SHAPES[shape]
    return before + unit * ((size_bytes - len(before) - len(after)) // len(unit)) + after


@contextmanager
def watched_health(address: Address, route: str = "/health") -> Iterator[Callable[[], float]]:
    """Asks for the server's health over new connections until the end of the block; yields the longest answer time."""
    times, failures, stop = [0.0], [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            began = time.monotonic()
            try:
                answer = httpx.get(f"http://{address[0]}:{address[1]}{route}", timeout=20)
                times.append(time.monotonic() - began)
                if answer.status_code != 200:
                    failures.append(answer.text)
            except httpx.TransportError as error:
                failures.append(repr(error))
            stop.wait(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(times)
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[:3]


def send_hostile_bodies(address: Address, size_bytes: int, shapes: Sequence[str] = tuple(HOSTILE_SHAPES)) -> float:
    """Every shape once; each must be refused in a bounded line, or scored."""
    with watched_health(address) as longest_s, httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as client:
        for shape in shapes:
            headers = {"Content-Type": "application/json"}
            body = hostile_body(shape, size_bytes)
            answer = client.post("/v2/rerank", content=body, headers=headers, timeout=60)
            assert answer.status_code in (200, 413, 422), (shape, answer.status_code)
            assert len(answer.content) < 2000, (shape, answer.text[:300])
    return longest_s()


def hold_idle_connections(address: Address, connections: int, seconds: float) -> float:
    """Connections that send nothing, or half a header."""
    with watched_health(address) as longest_s, ExitStack() as stack:
        for index in range(connections):
            connection = stack.enter_context(socket.create_connection(address, timeout=20))
            if index % 2:
                send_or_closed(connection, b"GET /health HTTP/1.1\r\nHos")
        time.sleep(seconds)
    return longest_s()


def hold_half_bodies(address: Address, clients: int, size_bytes: int, seconds: float) -> float:
    """Bodies of which all but the last byte is sent; then the clients disconnect."""
    with watched_health(address) as longest_s, ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        part = hostile_body("one text", size_bytes)[:-1]

        def send_most(_: int) -> None:
            connection = stack.enter_context(socket.create_connection(address, timeout=20))
            send_or_closed(connection, HEAD.format(size_bytes).encode() + part)

        list(pool.map(send_most, range(clients)))
        time.sleep(seconds)
    return longest_s()


def send_slow_bodies(address: Address, clients: int, seconds: float) -> float:
    """Bodies that arrive a byte at a time."""
    with watched_health(address) as longest_s, ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(clients)]
        for connection in connections:
            send_or_closed(connection, HEAD.format(1000).encode())
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for connection in connections:
                send_or_closed(connection, b"{")
            time.sleep(0.1)
    return longest_s()


def read_answers_slowly(address: Address, clients: int, documents: int, seconds: float) -> float:
    """Large answers that nobody reads."""
    body = {"query": "q", "documents": [" x" * 10_000] * documents, "return_documents": True}
    content = json.dumps(body).encode()
    with watched_health(address) as longest_s, ExitStack() as stack:
        for _ in range(clients):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(20)
            connection.connect(address)
            send_or_closed(connection, HEAD.format(len(content)).encode() + content)
        time.sleep(seconds)
    return longest_s()


def mix_load(address: Address, score: Callable[[str, Sequence[str]], np.ndarray], requests: int, seed: int = 0) -> None:
    """Right requests among aborted and wrong ones: every answer must have the scores of its own texts."""
    base = f"http://{address[0]}:{address[1]}"

    def ask(index: int) -> None:
        chance = random.Random(seed + index)
        texts = [f"text {chance.random()} " * chance.randrange(1, 30) for _ in range(chance.randrange(1, 20))]
        body = {"query": f"query {index}", "texts": texts, "raw_scores": True}
        content = json.dumps(body).encode()
        if index % 4 == 1:
            with socket.create_connection(address, timeout=20) as connection:
                send_or_closed(
                    connection, HEAD.format(len(content)).encode() + content[: chance.randrange(len(content))]
                )
            return
        if index % 4 == 2:
            wrong = httpx.post(f"{base}/rerank", json={"query": 1, "texts": texts}, timeout=60)
            assert wrong.status_code == 422, wrong.text
            return
        answer = httpx.post(f"{base}/rerank", json=body, timeout=60)
        if answer.status_code in (429, 503):
            assert int(answer.headers["retry-after"]) >= 1
            return
        hits = sorted(answer.raise_for_status().json(), key=lambda hit: int(hit["index"]))
        np.testing.assert_allclose([hit["score"] for hit in hits], score(body["query"], texts), atol=1e-4)

    with watched_health(address), ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(requests)))


def send_or_closed(connection: socket.socket, content: bytes) -> None:
    """Sends; a server that has closed the connection is no failure of an attack."""
    with suppress(OSError):
        connection.sendall(content)
