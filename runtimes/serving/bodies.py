"""Request bodies: their memory is bounded, and so is the cost of parsing a hostile one."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from pydantic import ValidationError
from starlette.types import Receive

from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.messages import CLOSE, ClientLeft, Refused, RerankRequest, clipped

_QUOTE = re.compile(b'"')
_OTHER_STRINGS = 64  # keys and values besides documents
_STRUCTURE_BYTES_PER_DOCUMENT = 64  # braces, commas, indentation
_OTHER_STRUCTURE_BYTES = 1 << 16
_KEY_CHARACTERS = 60
_READ_LIMITS = 4  # a body that is larger than this many times the limit is not read to its end


def parsed(body: bytes | bytearray, limits: Limits) -> RerankRequest:
    """Parses a body. Takes up to about 0.2 s for 32 MiB, so a large body needs a thread.

    Raises:
        Refused: 413 if it is too large, 422 if it is not such a request.
    """
    _check_structure(body, limits)
    try:
        request = RerankRequest.model_validate_json(body)
    except ValidationError as error:
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, _reason(error, body)) from None
    _check_size(request, limits)
    return request


def _check_structure(body: bytes | bytearray, limits: Limits) -> None:
    """Counts strings and the bytes between them, before any of them becomes an object.

    A parser takes about 100 bytes for each value of two bytes, so the body's size alone bounds nothing.
    """
    plain = body.replace(b"\\\\", b"..").replace(b'\\"', b"..")  # leaves the quotes that begin or end a string
    if plain.count(b'"') > 2 * (2 * limits.max_documents + _OTHER_STRINGS):  # {"text": "…"} has two strings
        raise _too_large(f"more texts than in {limits.max_documents} documents, the limit. Send fewer at a time")
    edges = [-1, *(match.start() for match in _QUOTE.finditer(plain)), len(plain)]
    structure_bytes = sum(end - start - 1 for start, end in zip(edges[::2], edges[1::2], strict=False))
    max_bytes = limits.max_documents * _STRUCTURE_BYTES_PER_DOCUMENT + _OTHER_STRUCTURE_BYTES
    if structure_bytes > max_bytes:
        raise _too_large(f"{structure_bytes} bytes of the body are outside its strings, limit {max_bytes}")


def _check_size(request: RerankRequest, limits: Limits) -> None:
    """Refuses a request with too many documents or characters."""
    passages = request.passages
    if len(passages) > limits.max_documents:
        raise _too_large(f"{len(passages)} documents, limit {limits.max_documents}. Send fewer at a time")
    for index, text in enumerate([request.query, *passages]):
        if len(text) > limits.max_text_characters:
            name = f"document {index - 1}" if index else "query"
            raise _too_large(f"{name}: {len(text)} characters, limit {limits.max_text_characters}")
    total = len(request.query) + sum(map(len, passages))
    if total > limits.max_request_characters:
        counted = f"{total} characters in all texts, limit {limits.max_request_characters}"
        raise _too_large(f"{counted}. Send fewer documents at a time")


def _too_large(message: str, headers: Mapping[str, str] | None = None) -> Refused:
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, headers=headers)


def _reason(error: ValidationError, body: bytes | bytearray) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        try:
            body.decode()
        except UnicodeDecodeError:
            return "the body is not JSON in UTF-8"
        return f"the body is not JSON ({first['ctx']['error']})"
    place = ".".join(clipped(str(part), _KEY_CHARACTERS) for part in first["loc"])
    return ": ".join(filter(None, (place, first["msg"])))


@dataclass(eq=False)
class _Upload:
    """One body."""

    content: bytearray = field(default_factory=bytearray)  # what has arrived; the parser may empty it
    counted_bytes: int = 0  # while its request lasts: its texts take the place of its bytes
    deadline: asyncio.Timeout | None = None  # ends the wait for the rest
    is_evicted: bool = False  # its memory was given to another body


class Bodies:
    """All request bodies in memory. For one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held_bytes = 0
        self._arriving: dict[_Upload, None] = {}  # oldest first

    @asynccontextmanager
    async def received(self, headers: Mapping[bytes, bytes], receive: Receive) -> AsyncIterator[bytearray]:
        """Receives a whole body, which is counted until the end of the block.

        Raises:
            Refused: 413 if the body is too large, 408 if it is too slow, 503 if there is no memory for it.
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
            self._held_bytes -= upload.counted_bytes

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
        """Reads a body in the time that it has."""
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
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, "overloaded", {**CLOSE, "Retry-After": "1"})
        if is_too_large:
            text = f"the request is larger than {self._limits.max_body_bytes} bytes. Send fewer documents at a time"
            raise _too_large(text, CLOSE)

    async def _read(self, upload: _Upload, headers: Mapping[bytes, bytes], receive: Receive) -> bool:
        """Whether it is too large: it is read all the same, because clients look for an answer when they have sent."""
        max_bytes = self._limits.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        is_too_large = len(declared) > 18 or not declared.isdigit() or int(declared) > max_bytes
        size_bytes = 0
        while size_bytes <= _READ_LIMITS * max_bytes and not upload.is_evicted:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part = message.get("body", b"")
            size_bytes += len(part)
            if size_bytes > max_bytes and not is_too_large:
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
        self._held_bytes += len(part)
        while self._held_bytes > self._limits.total_body_bytes and not upload.is_evicted:
            self.evict_oldest()

    def _drop(self, upload: _Upload) -> None:
        self._held_bytes -= upload.counted_bytes
        upload.counted_bytes = 0
        upload.content = bytearray()
