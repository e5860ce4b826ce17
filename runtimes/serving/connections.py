"""Connections that wait, write or read too slowly are closed; uvicorn has no limits for these."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ettin.runtimes.serving.bodies import Bodies, Limits

RESERVE = 64  # connections beyond the limit of requests: health checks and whoever is told to come again


class Connections:
    """Open connections of one server, and what closes them.

    Args:
        limits: `max_connections`, `header_timeout_s` and `body_timeout_s` apply.
        bodies: those that arrive on these connections.
    """

    def __init__(self, limits: Limits, bodies: Bodies) -> None:
        self.limits, self._bodies = limits, bodies
        self.idle: dict[Connection, None] = {}  # without a request, oldest first

    def protocol(self, *arguments: Any, **named: Any) -> "Connection":
        """Makes uvicorn's protocol object for a new connection."""
        return Connection(self, *arguments, **named)

    def admit(self, new: "Connection", open_connections: int) -> None:
        """Closes the oldest connection that waits for a request, or refuses the oldest body, if there are too many."""
        if open_connections <= self.limits.max_connections + RESERVE:
            return
        oldest = next(iter(self.idle))
        if oldest is new and self._bodies.evict_oldest():
            return
        del self.idle[oldest]
        oldest.transport.abort()


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with time limits.

    Args:
        connections: the server's.
        arguments: uvicorn's.
        named: uvicorn's.
    """

    def __init__(self, connections: Connections, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._shared = connections
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's: a new connection."""
        super().connection_made(transport)
        self._shared.idle[self] = None
        self._await_header()
        self._shared.admit(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: the connection is closed."""
        self._shared.idle.pop(self, None)
        self._stop_header_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio's: bytes from the client."""
        if not self._is_busy():
            self._await_header()
        super().data_received(data)

    def handle_events(self) -> None:
        """uvicorn's: reads what has arrived."""
        super().handle_events()
        self._note_state()

    def on_response_complete(self) -> None:
        """uvicorn's: an answer was handed over."""
        super().on_response_complete()
        self._note_state()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's: the client sent what is not HTTP, perhaps while it is being answered."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """asyncio's: the client reads more slowly than it is answered."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._shared.limits.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """asyncio's: the client has read most of its answer."""
        super().resume_writing()
        self._stop_write_timer()

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's: no further request came. What the client has not read yet it may read, but not forever."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size() and self._write_timer is None:
            self._write_timer = self.loop.call_later(self._shared.limits.body_timeout_s, self.transport.abort)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _note_state(self) -> None:
        if self._is_busy():
            self._stop_header_timer()
            self._shared.idle.pop(self, None)
        elif not self.transport.is_closing():
            self._shared.idle.setdefault(self)

    def _await_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._shared.limits.header_timeout_s, self._end)

    def _end(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
