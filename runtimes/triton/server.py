"""A real `tritonserver` on this machine: the one that `nvidia-pytriton` carries, with the Python backend, on CPUs."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ettin.artifacts.errors import MissingDependency, ServerError

_EXIT_S = 30


class TritonServer:
    """Starts on `with`, stops at its end.

    Args:
        repository: the model repository.
        http_port: None: a free one.
        grpc_port: None: a free one.
        metrics_port: None: a free one.
        address: that it listens on.
        arguments: more of tritonserver's own.
        log: where its output goes; None: to a file that goes away, of which errors are shown.

    Raises:
        MissingDependency: no `nvidia-pytriton`.
        ServerError: it did not start, or has nothing for this Python.
    """

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        address: str = "127.0.0.1",
        arguments: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        self._package = _package()
        self.repository, self._address, self._arguments = repository, address, arguments
        self.http_port, self.grpc_port, self.metrics_port = (
            port or free_port() for port in (http_port, grpc_port, metrics_port)
        )
        self._scratch = Path(tempfile.mkdtemp(prefix="ettin-triton-"))
        self.log = log or self._scratch / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its HTTP interface."""
        return f"http://{self._address}:{self.http_port}"

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process."""
        command = [
            str(self._package / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._backends()}",
            f"--exit-timeout-secs={_EXIT_S}",
            *(f"--{kind}-address={self._address}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--cache-directory={self._package / 'tritonserver' / 'caches'}",
            *self._arguments,
        ]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._environment()
            )

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Until every model can be used.

        Raises:
            ServerError: it ended, or took too long; with its own last error.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"tritonserver did not start: {self.last_error()}")
            if self.is_ready():
                return
            time.sleep(0.05)
        raise ServerError(f"tritonserver was not ready after {timeout_s:.0f} s: {self.last_error()}")

    def is_ready(self) -> bool:
        """Whether it says so."""
        try:
            with urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5) as answer:  # noqa: S310 (our own)
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self) -> int:
        """Until it ends; its exit code."""
        return self._process.wait() if self._process else 0

    def stop(self) -> None:
        """Ends the process, after what it is at; by force if that takes too long."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_EXIT_S + 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def last_error(self) -> str:
        """The last error in its log, in a line."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        errors = re.findall(r"^E\d{4} .*?\] (.*)$", text, re.M)
        return str(errors[-1]).strip(' "') if errors else "it gave no reason"

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _backends(self) -> Path:
        """Triton looks for the stub, which is made for one version of Python, beside the backend."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stubs = self._package / "tritonserver" / "python_backend_stubs"
        if not (stubs / version).exists():
            have = ", ".join(sorted(path.name for path in stubs.iterdir()))
            raise ServerError(f"this tritonserver has no stub for Python {version}, it has {have}")
        folder = self._scratch / "backends" / "python"
        shutil.copytree(self._package / "tritonserver" / "backends" / "python", folder)
        for path in (stubs / version).iterdir():
            shutil.copy2(path, folder / path.name)
        return folder.parent

    def _environment(self) -> Mapping[str, str]:
        """As in the virtual environment of this process: models without one of their own find theirs there."""
        bins = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        libraries = self._package.parent / "nvidia_pytriton.libs"
        return {**os.environ, "PATH": bins, "VIRTUAL_ENV": sys.prefix, "LD_LIBRARY_PATH": str(libraries)}


def _package() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise MissingDependency("a Triton server on this machine", "nvidia-pytriton", "triton")
    return Path(spec.origin).parent


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
