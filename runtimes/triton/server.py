"""A real `tritonserver` on this machine: the one that `nvidia-pytriton` contains, with the Python backend, on CPUs."""

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
import urllib.request
from collections.abc import Sequence
from pathlib import Path
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
        arguments: more arguments of tritonserver.

    Attributes:
        log: the server's output. It is removed when the server stops.

    Raises:
        MissingDependency: `nvidia-pytriton` is not installed.
        ServerError: the server did not start, or has nothing for this Python.
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
    ) -> None:
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise MissingDependency("a Triton server on this machine", "nvidia-pytriton", "triton")
        self._package = Path(spec.origin).parent
        self._repository, self._address, self._arguments = repository, address, arguments
        self.http_port, self.grpc_port, self.metrics_port = (
            port or free_port() for port in (http_port, grpc_port, metrics_port)
        )
        self.url = f"http://{address}:{self.http_port}"
        self._scratch = Path(tempfile.mkdtemp(prefix="ettin-triton-"))
        self.log = self._scratch / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process; None before it starts."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process, in the environment of this one: models find the virtual environment there."""
        server = self._package / "tritonserver"
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={self._repository}",
            f"--backend-directory={self._backends()}",
            f"--exit-timeout-secs={_EXIT_S}",
            *(f"--{kind}-address={self._address}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--cache-directory={server / 'caches'}",
            *self._arguments,
        ]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
            "VIRTUAL_ENV": sys.prefix,
            "LD_LIBRARY_PATH": str(self._package.parent / "nvidia_pytriton.libs"),
        }
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Waits until every model can be used.

        Raises:
            ServerError: the server ended, or took too long; with its own last error.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"tritonserver did not start: {self.last_error()}")
            try:
                urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5).close()  # noqa: S310 (our own server)
                return
            except OSError:  # it refuses connections, or answers that it is not ready
                time.sleep(0.05)
        raise ServerError(f"tritonserver was not ready after {timeout_s:.0f} s: {self.last_error()}")

    def wait(self) -> int:
        """Waits until the server ends; its exit code."""
        return self._process.wait() if self._process else 0

    def stop(self) -> None:
        """Ends the process after its current requests; kills it if that takes too long."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_EXIT_S + 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def last_error(self) -> str:
        """The last error in the server's log, in one line."""
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

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _backends(self) -> Path:
        """A copy of the Python backend with its stub, which is made for one version of Python, beside it."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stubs = self._package / "tritonserver" / "python_backend_stubs"
        if not (stubs / version).exists():
            available = ", ".join(sorted(path.name for path in stubs.iterdir()))
            raise ServerError(f"this tritonserver has no stub for Python {version}, it has {available}")
        folder = self._scratch / "backends" / "python"
        shutil.copytree(self._package / "tritonserver" / "backends" / "python", folder)
        shutil.copytree(stubs / version, folder, dirs_exist_ok=True)
        return folder.parent


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
