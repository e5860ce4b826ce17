"""Many clients against a server of ours: is every score right, what does serving cost, does memory stay."""

import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from ettin.artifacts.errors import ServerError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.triton_repository import TritonOptions, publish
from ettin.runtimes import Runtime, load
from ettin.runtimes.serving.tritonserver import TritonServer

_TIMEOUT_S = 120.0
_SINGLES = 0.5  # of the requests under mixed load bring one document


@dataclass(frozen=True)
class Asked:
    """A request and what it must be answered with.

    Args:
        query: text.
        documents: texts.
        gold: logits of each pair scored alone in process, float32 [documents].
    """

    query: str
    documents: Sequence[str]
    gold: NDArray[np.float32]


class Served(ABC):
    """A server in a process of its own, and how it is asked."""

    @abstractmethod
    def client(self) -> Callable[[Asked], NDArray[np.float32]]:
        """For one thread: sends a request, returns raw logits in the order of its documents."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """Of the server."""

    def memory_mib(self) -> float:
        """Of the server and its children, resident."""
        root = psutil.Process(self.pid)
        return sum(float(each.memory_info().rss) for each in [root, *root.children(recursive=True)]) / 2**20

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...


class InTriton(Served):
    """The artifact in Triton Inference Server, asked over gRPC."""

    def __init__(self, artifact: Path, max_length: int) -> None:
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        options = TritonOptions(runtime={"max_length": str(max_length)})
        publish(artifact, Manifest.read(artifact), folder / "models", "reranker", options)
        self._server = self._stack.enter_context(TritonServer(folder / "models"))

    def client(self) -> Callable[[Asked], NDArray[np.float32]]:
        from tritonclient import grpc

        client = self._stack.enter_context(grpc.InferenceServerClient(f"127.0.0.1:{self._server.grpc_port}"))

        def ask(asked: Asked) -> NDArray[np.float32]:
            tensors = []
            for name, texts in (("query", [asked.query]), ("documents", asked.documents)):
                tensor = grpc.InferInput(name, [1, len(texts)], "BYTES")
                tensor.set_data_from_numpy(np.array([[text.encode() for text in texts]], np.object_))
                tensors.append(tensor)
            found = client.infer("reranker", tensors, client_timeout=_TIMEOUT_S).as_numpy("scores")
            return np.asarray(found[0], np.float32)

        return ask

    @property
    def pid(self) -> int:
        return self._server.pid or 0

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class InHttp(Served):
    """The artifact in `ettin-serve`, asked over text-embeddings-inference's route."""

    def __init__(self, artifact: Path, max_length: int) -> None:
        import httpx

        self._httpx = httpx
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        code = "from ettin.runtimes.cli_serve import main; main()"
        options = ["--port", str(self._port), "--max-length", str(max_length), "--log-level", "warning"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(artifact), *options], stderr=subprocess.DEVNULL
        )
        self._clients: list[Any] = []
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{self._port}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        self._process.kill()
        raise ServerError(f"ettin-serve did not start. Run: ettin-serve {artifact}")

    def client(self) -> Callable[[Asked], NDArray[np.float32]]:
        client = self._httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=_TIMEOUT_S)
        self._clients.append(client)

        def ask(asked: Asked) -> NDArray[np.float32]:
            body = {"query": asked.query, "texts": asked.documents, "raw_scores": True}
            hits = client.post("/rerank", json=body).raise_for_status().json()
            found = np.full(len(asked.documents), np.nan, np.float32)
            found[[hit["index"] for hit in hits]] = [hit["score"] for hit in hits]
            return found

        return ask

    @property
    def pid(self) -> int:
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self._process.terminate()
        self._process.wait(60)


SERVERS: dict[str, Callable[[Path, int], Served]] = {"triton": InTriton, "http": InHttp}


@dataclass
class Tally:
    """What clients saw. Filled from several threads."""

    tolerance: float
    answers: int = 0
    pairs: int = 0
    wrong: int = 0
    max_abs_error: float = 0.0
    lost: list[str] = field(default_factory=list)
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, client: Callable[[Asked], NDArray[np.float32]], asked: Asked) -> None:
        """Asks, and compares the answer."""
        started = time.perf_counter()
        try:
            found = client(asked)
        except Exception as error:
            with self.lock:
                self.lost.append(f"{type(error).__name__}: {error}"[:200])
            return
        seconds = time.perf_counter() - started
        delta = np.abs(found - asked.gold).max(initial=0)
        with self.lock:
            self.answers += 1
            self.pairs += len(found)
            self.wrong += not delta <= self.tolerance  # a NaN is wrong
            self.max_abs_error = max(self.max_abs_error, float(delta))
            self.seconds[len(asked.documents)].append(seconds)

    def figures(self) -> dict[str, Any]:
        """For a result; latencies in milliseconds by number of documents."""
        latencies = {
            str(count): dict(
                zip(("p50", "p95", "p99"), (np.percentile(each, (50, 95, 99)) * 1000).tolist(), strict=True)
            )
            for count, each in sorted(self.seconds.items())
        }
        return {
            "answers": self.answers, "pairs": self.pairs, "wrong": self.wrong, "lost": len(self.lost),
            "first_errors": self.lost[:3], "max_abs_error": self.max_abs_error, "tolerance": self.tolerance,
            "latency_ms": latencies,
        }  # fmt: skip


def asked_of(
    runtime: Runtime, pairs: Sequence[tuple[str, str]], count: int, candidates: int, max_length: int
) -> tuple[list[Asked], float]:
    """Requests with their gold, and how far a score may be from it.

    A score depends a little on what shares its batch (padding, rounding): twice the largest such difference is allowed.

    Args:
        runtime: what scores in process.
        pairs: texts.
        count: requests.
        candidates: documents of each.
        max_length: tokens that pairs are truncated to.
    """
    documents = [document for _, document in pairs]
    texts = [
        (
            pairs[at % len(pairs)][0],
            [documents[(at * candidates + each) % len(documents)] for each in range(candidates)],
        )
        for at in range(count)
    ]
    flat = [(query, document) for query, each in texts for document in each]
    alone = runtime.predict(flat, batch_size=1, max_length=max_length, activation_fn="identity")
    mixed = runtime.predict(flat, max_length=max_length, activation_fn="identity")
    rows = alone.reshape(count, candidates)
    asked = [Asked(query, each, gold) for (query, each), gold in zip(texts, rows, strict=True)]
    return asked, 2 * float(np.abs(alone - mixed).max()) + 1e-4


def measured(
    artifact: Path, servers: Sequence[str], asked: Sequence[Asked], tolerance: float, runtime: Runtime,
    *, clients: int, rounds: int, minutes: float, max_length: int,
) -> dict[str, Any]:  # fmt: skip
    """Throughput beside the runtime in process, interleaved; then mixed load for some minutes, a server at a time.

    Args:
        artifact: what is served.
        servers: of `SERVERS`.
        asked: see `asked_of`.
        tolerance: see `asked_of`.
        runtime: the same artifact in this process.
        clients: at the same time.
        rounds: of the throughput.
        minutes: of mixed load.
        max_length: tokens that pairs are truncated to.
    """
    unknown = set(servers) - set(SERVERS)
    if unknown:
        raise UsageError(f"unknown server '{unknown.pop()}', expected one of: {', '.join(SERVERS)}")
    flat = [(each.query, document) for each in asked for document in each.documents]
    speeds: dict[str, list[float]] = defaultdict(list)
    tallies = {name: Tally(tolerance) for name in servers}
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        running = {name: stack.enter_context(SERVERS[name](artifact, max_length)) for name in servers}
        asks = {name: [served.client() for _ in range(clients)] for name, served in running.items()}
        for number in range(rounds + 1):  # the first warms up
            seconds = _timed(lambda: runtime.predict(flat, max_length=max_length))
            if number:
                speeds["in process"].append(len(flat) / seconds)
            for name in servers:
                tally = tallies[name] if number else Tally(tolerance)
                seconds = _timed(lambda name=name, tally=tally: _once_each(asks[name], asked, tally))  # type: ignore[misc]
                if number:
                    speeds[name].append(len(flat) / seconds)
        for name, served in running.items():
            mixed, memory = _mixed(served, asks[name], asked, tolerance, minutes * 60)
            results[name] = {
                "full": tallies[name].figures(), "mixed": mixed.figures(), "mixed_seconds": minutes * 60,
                "memory_mib": memory,
            }  # fmt: skip
    base = median(speeds["in process"])
    return {
        "in_process_pairs_per_s": speeds["in process"],
        "servers": {
            name: {"pairs_per_s": speeds[name], "share_of_in_process": median(speeds[name]) / base, **results[name]}
            for name in servers
        },
    }


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _once_each(clients: Sequence[Callable[[Asked], NDArray[np.float32]]], asked: Sequence[Asked], tally: Tally) -> None:
    left: SimpleQueue[Asked] = SimpleQueue()
    for each in asked:
        left.put(each)

    def work(client: Callable[[Asked], NDArray[np.float32]]) -> None:
        while True:
            try:
                tally.ask(client, left.get_nowait())
            except Empty:
                return

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(work, clients))


def _mixed(
    served: Served, clients: Sequence[Callable[[Asked], NDArray[np.float32]]], asked: Sequence[Asked],
    tolerance: float, seconds: float,
) -> tuple[Tally, list[float]]:  # fmt: skip
    """Every client asks for one document or for all, at once again; memory every twentieth of the time."""
    tally, deadline = Tally(tolerance), time.monotonic() + seconds

    def work(number: int) -> None:
        choice = random.Random(number)  # noqa: S311
        while time.monotonic() < deadline:
            each = choice.choice(asked)
            if choice.random() < _SINGLES:
                at = choice.randrange(len(each.documents))
                each = Asked(each.query, [each.documents[at]], each.gold[at : at + 1])
            tally.ask(clients[number], each)

    memory: list[float] = []
    with ThreadPoolExecutor(len(clients)) as pool:
        working = [pool.submit(work, number) for number in range(len(clients))]
        while time.monotonic() < deadline:
            time.sleep(seconds / 20)
            memory.append(round(served.memory_mib(), 1))
        for each in working:
            each.result()
    return tally, memory


def run(
    artifact: Path, servers: Sequence[str], pairs: Sequence[tuple[str, str]], *, clients: int, requests: int,
    candidates: int, rounds: int, minutes: float, max_length: int,
) -> dict[str, Any]:  # fmt: skip
    """All of it; see `asked_of` and `measured`."""
    with load(artifact) as runtime:
        length = min(max_length, runtime.max_length)
        asked, tolerance = asked_of(runtime, pairs, requests, candidates, length)
        found = measured(
            artifact, servers, asked, tolerance, runtime, clients=clients, rounds=rounds, minutes=minutes,
            max_length=length,
        )  # fmt: skip
        about = {"artifact": f"{runtime.manifest.name}/{runtime.manifest.target}-{runtime.manifest.precision}",
                 "weights": runtime.manifest.source.weights, "runtime": runtime.description}  # fmt: skip
    settings = {"clients": clients, "requests": requests, "candidates": candidates, "rounds": rounds,
                "minutes": minutes, "max_length": length}  # fmt: skip
    return {**about, **settings, **found}
