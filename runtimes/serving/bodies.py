"""Request bodies in memory: bounded in size, in time, and in sum over all requests."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus

from starlette.types import Receive

from ettin.runtimes.serving.answers import CLOSE, ClientLeft, Refused
from ettin.runtimes.serving.limits import Limits

_DRAIN = 4  # times the limit: a body that is larger is not read to its end
_RETRY = {**CLOSE, "Retry-After": "1"}


class _Upload:
    """One body.

    Attributes:
        content: what has arrived. Who parses it may empty it.
        counted_bytes: counted for it, as long as its request lasts: its texts take the place of its bytes.
        deadline: ends the wait for the rest.
        is_evicted: whether its room was given to another.
    """

    def __init__(self) -> None:
        self.content = bytearray()
        self.counted_bytes = 0
        self.deadline: asyncio.Timeout | None = None
        self.is_evicted = False


class Bodies:
    """All request bodies in memory. For one event loop.

    Args:
        limits: `max_body_bytes`, `total_body_bytes` and `body_timeout_s` apply.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held_bytes = 0
        self._arriving: dict[_Upload, None] = {}  # oldest first

    @asynccontextmanager
    async def received(self, headers: Mapping[bytes, bytes], receive: Receive) -> AsyncIterator[bytearray]:
        """A whole body, counted until the end of the block.

        Args:
            headers: of the request.
            receive: ASGI's.

        Raises:
            Refused: 413 for a body that is too large, 408 for one that is too slow, 503 without room for it.
            ClientLeft: the connection ended before the body did.
        """
        upload = _Upload()
        self._arriving[upload] = None
        try:
            await self._fill(upload, headers, receive)
            self._arriving.pop(upload, None)
            yield upload.content
        finally:
            self._arriving.pop(upload, None)
            self.held_bytes -= upload.counted_bytes

    def evict_oldest(self) -> bool:
        """Refuses the body that has been arriving for the longest time; False if none is arriving."""
        upload = next(iter(self._arriving), None)
        if upload is None:
            return False
        del self._arriving[upload]
        upload.is_evicted = True
        self._drop(upload)
        if upload.deadline is not None:
            upload.deadline.reschedule(asyncio.get_running_loop().time())
        return True

    async def _fill(self, upload: _Upload, headers: Mapping[bytes, bytes], receive: Receive) -> None:
        try:
            async with asyncio.timeout(self._limits.body_timeout_s) as upload.deadline:
                is_too_large = await self._read(upload, headers, receive)
        except TimeoutError:
            if not upload.is_evicted:
                text = f"the body did not arrive in {self._limits.body_timeout_s:g} s"
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, text, headers=CLOSE) from None
        finally:
            upload.deadline = None
        if upload.is_evicted:
            text = "the server holds too many request bodies. Try again in 1 s"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, "overloaded", _RETRY)
        if is_too_large:
            text = f"the request is larger than {self._limits.max_body_bytes} bytes. Send fewer documents at a time"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, headers=CLOSE)

    async def _read(self, upload: _Upload, headers: Mapping[bytes, bytes], receive: Receive) -> bool:
        """Whether it is too large: it is read all the same, because clients look for an answer when they have sent."""
        most = self._limits.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        is_too_large = len(declared) > 18 or not declared.isdigit() or int(declared) > most
        size = 0
        while size <= _DRAIN * most and not upload.is_evicted:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part = message.get("body", b"")
            size += len(part)
            if size > most and not is_too_large:
                is_too_large = True
                self._drop(upload)
            if not is_too_large and not upload.is_evicted:
                self._add(upload, part)
            if not message.get("more_body", False):
                break
        return is_too_large

    def _add(self, upload: _Upload, part: bytes) -> None:
        upload.content += part
        upload.counted_bytes += len(part)
        self.held_bytes += len(part)
        while self.held_bytes > self._limits.total_body_bytes and not upload.is_evicted:
            self.evict_oldest()

    def _drop(self, upload: _Upload) -> None:
        self.held_bytes -= upload.counted_bytes
        upload.counted_bytes = 0
        upload.content = bytearray()
