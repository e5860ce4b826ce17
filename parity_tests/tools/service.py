"""A server of ours in a process of its own, and one without an engine in this process, for the tests over HTTP."""

import asyncio
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from ettin.runtimes.request import Scored
from ettin.runtimes.serving.app import create_app
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.limits import Limits


class Service:
    """The command in a process of its own."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None, open_files: int = 0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        limit = (
            f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({open_files},) * 2); " if open_files else ""
        )
        code = f"{limit}from ettin.runtimes.commands.serve import main; main()"
        words = [sys.executable, "-c", code, *map(str, arguments), "--port", str(self.port)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__; a pipe that nobody reads would fill)
        self.process = subprocess.Popen(words, stderr=self._log, env=environment)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(self.stop())

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> str:
        """Waits for its end; its log."""
        self.process.wait(timeout=40)
        return self.log()

    def log(self) -> str:
        """What it wrote so far."""
        self._log.seek(0)
        return self._log.read()

    def memory_mib(self) -> int:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) >> 10

    def __enter__(self) -> "Service":
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.stop()
        self._log.close()


def zeros(documents: Sequence[str]) -> Scored:
    count = len(documents)
    return Scored(np.zeros(count, np.float32), np.ones(count, np.int32), np.zeros(count, np.bool_))


class Stub(Backend):
    """Raises, or answers when it may."""

    name, description, max_length = "stub", "a stub", 512

    def __init__(self, error: Exception | None = None, ready: bool = True) -> None:
        self.error, self.ready, self.closed = error, ready, False

    async def score(self, query: str, documents: Sequence[str], *_: object) -> Scored:
        if self.error:
            raise self.error
        return Scored(
            np.zeros(len(documents), np.float32), np.ones(len(documents), np.int32), np.zeros(len(documents), np.bool_)
        )

    async def is_ready(self) -> bool:
        return self.ready

    async def close(self) -> None:
        self.closed = True


def ask_app(
    backend: Backend, ask: Callable[[httpx.AsyncClient], Any], limits: Limits | None = None, key: str | None = None
) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(create_app({backend.name: backend}, limits, key), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer: httpx.Response = await ask(client)
            return answer

    return asyncio.run(run())
