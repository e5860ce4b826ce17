"""Many clients against a server of ours: is every score right, what does serving cost, does memory stay."""

import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray

from ettin.artifacts.errors import ServerError
from ettin.artifacts.manifest import Manifest
from ettin.bench.machine import about
from ettin.runtimes import Runtime, load
from ettin.runtimes.triton.repository import TritonOptions, publish
from ettin.runtimes.triton.server import TritonServer, free_port

_SINGLES = 0.5  # share of the requests under mixed load that bring one document
_ROUNDS = 3  # of the throughput, interleaved
_TIMEOUT_S = 120.0
Scores = NDArray[np.float32]
# For one thread: sends a query and documents, returns raw logits in their order.
Client = Callable[[str, Sequence[str]], Scores]


@dataclass(frozen=True)
class ServedArtifact:
    """A server in a process of its own."""

    pid: int
    port: int  # on 127.0.0.1: HTTP, or gRPC for Triton
    client: Callable[[], Client]  # makes a client

    def memory_mib(self) -> float:
        """Resident memory of the server and its children."""
        processes = [root := psutil.Process(self.pid), *root.children(recursive=True)]
        return sum(float(process.memory_info().rss) for process in processes) / 2**20


@contextmanager
def triton(artifact: Path, max_length: int) -> Iterator[ServedArtifact]:
    """The artifact in Triton Inference Server, asked over gRPC."""
    from tritonclient import grpc

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        publish(artifact, folder / "models", "reranker", TritonOptions(runtime={"max_length": str(max_length)}))
        server = stack.enter_context(TritonServer(folder / "models"))

        def client() -> Client:
            connection = stack.enter_context(grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}"))

            def ask(query: str, documents: Sequence[str]) -> Scores:
                tensors = []
                for name, texts in (("query", [query]), ("documents", documents)):
                    tensor = grpc.InferInput(name, [1, len(texts)], "BYTES")
                    tensor.set_data_from_numpy(np.array([[text.encode() for text in texts]], np.object_))
                    tensors.append(tensor)
                answer = connection.infer("reranker", tensors, client_timeout=_TIMEOUT_S)
                return np.asarray(answer.as_numpy("scores")[0], np.float32)

            return ask

        yield ServedArtifact(server.pid or 0, server.grpc_port, client)


@contextmanager
def http_server(artifact: Path, *options: str) -> Iterator[tuple[int, int]]:
    """An `ettin-serve` of the artifact on this machine; yields its process number and port.

    Raises:
        ServerError: it did not start.
    """
    port = free_port()
    command = [sys.executable, str(Path(sys.executable).with_name("ettin-serve")), str(artifact), "--port", str(port)]
    process = subprocess.Popen([*command, *options, "--log-level", "warning"], stderr=subprocess.DEVNULL)
    with ExitStack() as stack:
        stack.callback(process.wait, 60)
        stack.callback(process.terminate)
        _await_health(f"http://127.0.0.1:{port}/health", process, f"ettin-serve {artifact}")
        yield process.pid, port


@contextmanager
def ettin_serve(artifact: Path, max_length: int) -> Iterator[ServedArtifact]:
    """The artifact in `ettin-serve`, asked over text-embeddings-inference's route."""
    with ExitStack() as stack:
        pid, port = stack.enter_context(http_server(artifact, "--max-length", str(max_length)))
        url = f"http://127.0.0.1:{port}"

        def client() -> Client:
            connection = stack.enter_context(httpx.Client(base_url=url, timeout=_TIMEOUT_S))

            def ask(query: str, documents: Sequence[str]) -> Scores:
                body = {"query": query, "texts": documents, "raw_scores": True}
                hits = connection.post("/rerank", json=body).raise_for_status().json()
                scores = np.full(len(documents), np.nan, np.float32)
                scores[[hit["index"] for hit in hits]] = [hit["score"] for hit in hits]
                return scores

            return ask

        yield ServedArtifact(pid, port, client)


def _await_health(url: str, process: subprocess.Popen[bytes], command: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise ServerError(f"ettin-serve did not start. Run: {command}")


SERVERS = {"triton": triton, "http": ettin_serve}


@dataclass(frozen=True)
class Asked:
    """A request and what it must be answered with: gold are the logits of each pair scored alone in process."""

    query: str
    documents: Sequence[str]
    gold: Scores


@dataclass
class Tally:
    """What clients saw; filled from several threads. A right score is at most `tolerance` from its gold."""

    tolerance: float
    answers: list[tuple[int, float, float]] = field(default_factory=list)  # documents, seconds, largest error
    lost: list[str] = field(default_factory=list)

    def ask(self, client: Client, asked: Asked) -> None:
        """Asks, and compares the answer."""
        start = time.perf_counter()
        try:
            scores = client(asked.query, asked.documents)
        except Exception as error:
            self.lost.append(f"{type(error).__name__}: {error}"[:200])
            return
        seconds = time.perf_counter() - start
        self.answers.append((len(scores), seconds, float(np.abs(scores - asked.gold).max(initial=0))))

    def figures(self) -> dict[str, Any]:
        """For a result; latencies in milliseconds by number of documents."""
        counts, seconds, errors = np.array(self.answers or np.empty((0, 3))).T
        latencies = {}
        for count in np.unique(counts):
            values = np.percentile(seconds[counts == count], (50, 95, 99)) * 1000
            latencies[f"{count:.0f}"] = dict(zip(("p50", "p95", "p99"), values.tolist(), strict=True))
        return {
            "answers": len(counts),
            "pairs": int(counts.sum()),
            "wrong": int((~(errors <= self.tolerance)).sum()),  # a NaN is wrong
            "lost": len(self.lost),
            "first_errors": self.lost[:3],
            "max_abs_error": float(errors.max(initial=0)),
            "tolerance": self.tolerance,
            "latency_ms": latencies,
        }


def requests_with_gold(
    runtime: Runtime, pairs: Sequence[tuple[str, str]], count: int, candidates: int
) -> tuple[list[Asked], float]:
    """`count` requests of `candidates` documents with their gold, and how far a right score may be from it.

    A score depends a little on what shares its batch (padding, rounding): twice the largest such difference is allowed.
    """
    documents = cycle(document for _, document in pairs)
    queries = islice(cycle(query for query, _ in pairs), count)
    texts = [(query, list(islice(documents, candidates))) for query in queries]
    flat = [(query, document) for query, chosen in texts for document in chosen]
    alone = runtime.predict(flat, batch_size=1, activation_fn="identity")
    mixed = runtime.predict(flat, activation_fn="identity")
    golds = alone.reshape(count, candidates)
    asked = [Asked(query, chosen, gold) for (query, chosen), gold in zip(texts, golds, strict=True)]
    return asked, 2 * float(np.abs(alone - mixed).max()) + 1e-4


def measured_load(
    artifact: Path, pairs: Sequence[tuple[str, str]], *, servers: Sequence[str], clients: int, requests: int,
    candidates: int, minutes: float,
) -> dict[str, Any]:  # fmt: skip
    """Throughput beside the runtime in process, interleaved; then mixed load for some minutes, a server at a time."""
    max_length = min(512, Manifest.read(artifact).max_length_tokens)
    counts = {"clients": clients, "requests": requests, "candidates": candidates}
    settings = {**counts, "rounds": _ROUNDS, "minutes": minutes, "max_length": max_length}
    with load(artifact, max_length=max_length) as runtime, ExitStack() as stack:
        asked, tolerance = requests_with_gold(runtime, pairs, requests, candidates)
        running = {name: stack.enter_context(SERVERS[name](artifact, max_length)) for name in servers}
        asking = {name: [server.client() for _ in range(clients)] for name, server in running.items()}
        full = {name: Tally(tolerance) for name in servers}
        speeds: dict[str, list[float]] = defaultdict(list)
        flat = [(request.query, document) for request in asked for document in request.documents]
        for number in range(_ROUNDS + 1):  # the first round warms up and does not count
            seconds = {"in process": _timed(runtime.predict, flat)}
            for name in servers:
                seconds[name] = _timed(_ask_once_each, asking[name], asked, full[name] if number else Tally(tolerance))
            for name in seconds if number else ():
                speeds[name].append(len(flat) / seconds[name])
        in_process, rows = speeds.pop("in process"), {}
        for name, server in running.items():
            share = median(speeds[name]) / median(in_process)
            rows[name] = {"pairs_per_s": speeds[name], "share_of_in_process": share, "full": full[name].figures()}
            mixed, memory_mib = mixed_load(server, asking[name], asked, tolerance, minutes * 60)
            rows[name] |= {"mixed": mixed.figures(), "mixed_seconds": minutes * 60, "memory_mib": memory_mib}
        return {**about(runtime), **settings, "in_process_pairs_per_s": in_process, "servers": rows}


def _timed(run: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def _ask_once_each(clients: Sequence[Client], asked: Sequence[Asked], tally: Tally) -> None:
    idle: SimpleQueue[Client] = SimpleQueue()
    for client in clients:
        idle.put(client)

    def work(request: Asked) -> None:
        client = idle.get()
        tally.ask(client, request)
        idle.put(client)

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(work, asked))


def mixed_load(
    server: ServedArtifact, clients: Sequence[Client], asked: Sequence[Asked], tolerance: float, seconds: float
) -> tuple[Tally, list[float]]:
    """Every client asks again and again, for one document of a request or for all of them.

    Returns what the clients saw, and the server's memory in MiB at every twentieth of the time.
    """
    tally, deadline = Tally(tolerance), time.monotonic() + seconds

    def work(number: int) -> None:
        choice = random.Random(number)  # noqa: S311
        while time.monotonic() < deadline:
            request = choice.choice(asked)
            if choice.random() < _SINGLES:
                index = choice.randrange(len(request.documents))
                request = Asked(request.query, [request.documents[index]], request.gold[index : index + 1])
            tally.ask(clients[number], request)

    memory_mib: list[float] = []
    with ThreadPoolExecutor(len(clients)) as pool:
        working = [pool.submit(work, number) for number in range(len(clients))]
        while time.monotonic() < deadline:
            time.sleep(seconds / 20)
            memory_mib.append(round(server.memory_mib(), 1))
        for future in working:
            future.result()
    return tally, memory_mib
