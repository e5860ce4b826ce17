"""The server process: uvicorn with limits for connections, from its first connection until it has drained."""

import asyncio
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ettin.runtimes.processes import give_memory_back
from ettin.runtimes.serving.bodies import Bodies
from ettin.runtimes.serving.gate import Health
from ettin.runtimes.serving.limits import ACCEPTED_AT_ONCE, BACKLOG, SPARE_CONNECTIONS, Limits

_TRIM_TICKS = 20  # of 0.1 s, between two times that free memory is given back to the system
_FINISH_S = 30  # for requests in progress when the server stops


async def serve(listening: socket.socket, app: FastAPI, limits: Limits) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests that were accepted.

    Args:
        listening: the socket that clients connect to.
        app: see `create_app`.
        limits: of connections.
    """
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(_Connection, limits, app.state.bodies, {})),  # typed as a class, used as a function
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=_FINISH_S,
    )
    await _Server(config, app.state.health, limits.drain_s).serve(sockets=[listening])


class _Server(uvicorn.Server):
    """uvicorn's server, which after a first SIGTERM serves on as "not ready" until load balancers have seen it."""

    def __init__(self, config: uvicorn.Config, health: Health, drain_s: float) -> None:
        super().__init__(config)
        self._health, self._drain_s = health, drain_s
        self._drain_end_s: float | None = None
        self._trimmed_after = (0, 0, 0)  # requests, requests in progress, connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens. asyncio takes one number for the kernel's queue and for what it accepts at once."""
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal to stop has arrived. A second one ends the draining."""
        if self._drain_s and not self._health.is_draining:
            self._captured_signals.append(sig)
            self._drain_end_s = time.monotonic() + self._drain_s
        else:
            super().handle_exit(sig, frame)
        self._health.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Says whether to stop. Called ten times per second."""
        if self._drain_end_s is not None and time.monotonic() >= self._drain_end_s:
            self.should_exit = True
        if counter % _TRIM_TICKS == 0:
            state = self.server_state
            work = (state.total_requests, len(state.tasks), len(state.connections))
            if work != self._trimmed_after:  # a client that leaves an answer unread frees it without a request
                self._trimmed_after = work
                await asyncio.to_thread(give_memory_back)
        return await super().on_tick(counter)


class _Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, which closes connections that wait, write or read too slowly.

    `idle` has the connections without a request, oldest first. All connections of a server share it.
    """

    def __init__(
        self, limits: Limits, bodies: Bodies, idle: "dict[_Connection, None]", *arguments: Any, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._limits, self._bodies, self._idle = limits, bodies, idle
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle[self] = None
        self._start_timer("header", self._limits.header_timeout_s, self._close)
        if len(self.connections) > self._limits.max_connections + SPARE_CONNECTIONS:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._stop_timer("header")
        self._stop_timer("answer")
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_busy():
            self._start_timer("header", self._limits.header_timeout_s, self._close)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._note_state()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_state()

    def send_400_response(self, msg: str) -> None:
        """The client sent something that is not HTTP, perhaps while it is being answered."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._start_timer("answer", self._limits.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read most of its answer."""
        super().resume_writing()
        self._stop_timer("answer")

    def timeout_keep_alive_handler(self) -> None:
        """No further request came. The client may read the rest of its answer, but not for ever."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self._start_timer("answer", self._limits.body_timeout_s, self.transport.abort)

    def _make_room(self) -> None:
        """Closes the oldest connection without a request; if that is this one, refuses the oldest body instead.

        A connection's first bytes are read before the connections after it can fill the spare ones.
        """
        oldest = next(iter(self._idle))
        if oldest is self and self._bodies.evict_oldest():
            return
        del self._idle[oldest]
        oldest.transport.abort()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _note_state(self) -> None:
        if self._is_busy():
            self._stop_timer("header")
            self._idle.pop(self, None)
        elif not self.transport.is_closing():
            self._idle.setdefault(self)

    def _close(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _start_timer(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        """Runs the action after a time, unless the timer runs already or is stopped."""
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, action)

    def _stop_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
