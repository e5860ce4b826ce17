"""The server process: uvicorn with our limits, from its first connection until it has drained."""

import asyncio
import resource
import socket
import time
from collections.abc import Sequence
from typing import Any, cast

import uvicorn

from ettin.artifacts.errors import UsageError
from ettin.runtimes.processes import give_memory_back
from ettin.runtimes.serving.app import create_app
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import Bodies, Limits
from ettin.runtimes.serving.connections import RESERVE, Connections
from ettin.runtimes.serving.health import Health

_BACKLOG = 128  # connections that the kernel holds, and that asyncio accepts before any of them counts
_OTHER_FILES = 64  # the engine's and Python's
_TRIM_TICKS = 20  # of 0.1 s, between two times that free memory is given back to the system
_FINISH_S = 30  # for requests in progress when the server stops


async def serve(
    listening: socket.socket,
    backend: Backend,
    limits: Limits,
    *,
    api_key: str | None = None,
    names: Sequence[str] = (),
    drain_s: float = 0.0,
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted.

    Args:
        listening: where clients connect.
        backend: what scores; closed at the end.
        limits: of requests and connections.
        api_key: that clients must show; None: none.
        names: that clients may call the model by, besides its own.
        drain_s: see `Server`.
    """
    bodies, health = Bodies(limits), Health(backend, limits.probe_timeout_s)
    app = create_app(backend, limits, api_key, names, bodies=bodies, health=health)
    config = uvicorn.Config(
        app,
        http=cast(Any, Connections(limits, bodies).protocol),  # typed as a class, used as a function
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_FINISH_S,
    )
    await Server(config, health, drain_s).serve(sockets=[listening])


class Server(uvicorn.Server):
    """uvicorn's server, which after a first SIGTERM serves on as "not ready" until load balancers have seen it.

    Args:
        config: uvicorn's.
        health: told that the server drains.
        drain_s: time between the signal and the end of accepting connections; a second signal ends it.
    """

    def __init__(self, config: uvicorn.Config, health: Health, drain_s: float) -> None:
        super().__init__(config)
        self._health, self._drain_s = health, drain_s
        self._drained_at: float | None = None
        self._trimmed_requests = 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """uvicorn's: a signal to stop."""
        if self._drain_s and not self._health.is_draining:
            self._health.is_draining = True
            self._captured_signals.append(sig)
            self._drained_at = time.monotonic() + self._drain_s
            return
        self._health.is_draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's: whether to stop; asked ten times per second."""
        if self._drained_at is not None and time.monotonic() >= self._drained_at:
            self.should_exit = True
        if counter % _TRIM_TICKS == 0 and self._trimmed_requests != self.server_state.total_requests:
            self._trimmed_requests = self.server_state.total_requests
            await asyncio.to_thread(give_memory_back)
        return await super().on_tick(counter)


def raise_file_limit(limits: Limits) -> None:
    """Lets this process open as many files as it is allowed to.

    Raises:
        UsageError: fewer than the connections need.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = limits.max_connections + RESERVE + _BACKLOG + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"--max-connections {limits.max_connections} needs {needed} open files, the limit of this process is "
            f"{hard}. Lower it, or raise the limit: ulimit -n {needed} (LimitNOFILE= in systemd)"
        )
