"""Our servers in processes of their own, and how a client asks them."""

import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from ettin.artifacts.errors import ServerError
from ettin.runtimes.triton.repository import TritonOptions, publish
from ettin.runtimes.triton.server import TritonServer, free_port

TIMEOUT_S = 120.0


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


Ask = Callable[[Asked], NDArray[np.float32]]


class Served(ABC):
    """A server in a process of its own, and how it is asked."""

    @property
    @abstractmethod
    def port(self) -> int:
        """Port on 127.0.0.1: HTTP, or gRPC for Triton."""

    @abstractmethod
    def client(self) -> Ask:
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
        publish(artifact, folder / "models", "reranker", options)
        self._server = self._stack.enter_context(TritonServer(folder / "models"))

    def client(self) -> Ask:
        from tritonclient import grpc

        client = self._stack.enter_context(grpc.InferenceServerClient(f"127.0.0.1:{self._server.grpc_port}"))

        def ask(asked: Asked) -> NDArray[np.float32]:
            tensors = []
            for name, texts in (("query", [asked.query]), ("documents", asked.documents)):
                tensor = grpc.InferInput(name, [1, len(texts)], "BYTES")
                tensor.set_data_from_numpy(np.array([[text.encode() for text in texts]], np.object_))
                tensors.append(tensor)
            found = client.infer("reranker", tensors, client_timeout=TIMEOUT_S).as_numpy("scores")
            return np.asarray(found[0], np.float32)

        return ask

    @property
    def port(self) -> int:
        return self._server.grpc_port

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
        self._port = free_port()
        code = "from ettin.runtimes.commands.serve import main; main()"
        options = ["--port", str(self._port), "--max-length", str(max_length), "--log-level", "warning"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(artifact), *options], stderr=subprocess.DEVNULL
        )
        self._clients: list[Any] = []
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{self._port}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        self._process.kill()
        raise ServerError(f"ettin-serve did not start. Run: ettin-serve {artifact}")

    def client(self) -> Ask:
        client = self._httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=TIMEOUT_S)
        self._clients.append(client)

        def ask(asked: Asked) -> NDArray[np.float32]:
            body = {"query": asked.query, "texts": asked.documents, "raw_scores": True}
            hits = client.post("/rerank", json=body).raise_for_status().json()
            found = np.full(len(asked.documents), np.nan, np.float32)
            found[[hit["index"] for hit in hits]] = [hit["score"] for hit in hits]
            return found

        return ask

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self._process.terminate()
        self._process.wait(60)


SERVERS: dict[str, Callable[[Path, int], Served]] = {"triton": InTriton, "http": InHttp}
