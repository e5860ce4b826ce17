"""Request bodies: kept within bounds in memory, and parsed at a cost that a hostile body can't raise far."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

from pydantic import ValidationError
from starlette.types import Receive

from ettin.runtimes.serving.answers import CLOSE, ClientLeft, Refused, clipped
from ettin.runtimes.serving.schemas import RerankRequest, TeiRequest

PROBES = ("/health", "/health/live", "/health/ready")  # answered even when no other request is


@dataclass(frozen=True)
class Limits:
    """Limits of the HTTP service.

    Args:
        max_body_bytes: size of one request body.
        total_body_bytes: size of all request bodies in memory, from their first byte to their answer.
        max_documents: documents in one request.
        max_text_characters: characters in one query or document.
        max_request_characters: characters in all texts of one request.
        max_connections: requests in progress; idle connections are closed, oldest first, to make room.
        header_timeout_s: for a whole request header to arrive.
        body_timeout_s: for a whole body to arrive, or for the client to read an answer.
        probe_timeout_s: for the engine to score one pair before `/health/live` answers 503.
    """

    max_body_bytes: int = 32 << 20
    total_body_bytes: int = 128 << 20
    max_documents: int = 10_000
    max_text_characters: int = 1_000_000
    max_request_characters: int = 32 << 20
    max_connections: int = 512
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    probe_timeout_s: float = 10.0


_Request = TypeVar("_Request", TeiRequest, RerankRequest)
_QUOTE = re.compile(b'"')
_OTHER_STRINGS = 64  # keys and values besides documents
_STRUCTURE_BYTES_PER_DOCUMENT = 64  # braces, commas, indentation
_OTHER_STRUCTURE_BYTES = 1 << 16
_KEY_CHARACTERS = 60


def parsed(model: type[_Request], body: bytes | bytearray, limits: Limits) -> _Request:
    """The request in a body. Blocks for up to about 0.2 s for a body of 32 MiB: not for an event loop.

    Raises:
        Refused: 413 for what is too large, 422 for what is not such a request.
    """
    _check_structure(body, limits)
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, _reason(error, body)) from None
    _check_size(request, limits)
    return request


def _check_structure(body: bytes | bytearray, limits: Limits) -> None:
    """Counts strings and what is between them, before any of them becomes an object.

    A parser takes about 100 bytes for each value of two bytes, so the body's size alone bounds nothing.
    """
    plain = body.replace(b"\\\\", b"..").replace(b'\\"', b"..")  # only quotes that begin or end a string are left
    if plain.count(b'"') > 2 * (2 * limits.max_documents + _OTHER_STRINGS):  # {"text": "…"} has two
        text = f"more texts than in {limits.max_documents} documents, the limit. Send fewer at a time"
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
    edges = [-1, *(match.start() for match in _QUOTE.finditer(plain)), len(plain)]
    structure = sum(end - start - 1 for start, end in zip(edges[::2], edges[1::2], strict=False))
    most = limits.max_documents * _STRUCTURE_BYTES_PER_DOCUMENT + _OTHER_STRUCTURE_BYTES
    if structure > most:
        text = f"{structure} bytes of the body are outside its strings, limit {most}"
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)


def _check_size(request: TeiRequest | RerankRequest, limits: Limits) -> None:
    texts, most = request.passages, limits.max_text_characters
    if len(texts) > limits.max_documents:
        text = f"{len(texts)} documents, limit {limits.max_documents}. Send fewer at a time"
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
    if len(request.query) > most:
        text = f"query: {len(request.query)} characters, limit {most}"
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
    for index, passage in enumerate(texts):
        if len(passage) > most:
            text = f"document {index}: {len(passage)} characters, limit {most}"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
    total = len(request.query) + sum(map(len, texts))
    if total > limits.max_request_characters:
        text = f"{total} characters in all texts, limit {limits.max_request_characters}. Send fewer documents at a time"
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)


def _reason(error: ValidationError, body: bytes | bytearray) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        try:
            body.decode()
        except UnicodeDecodeError:
            return "the body is not JSON in UTF-8"
        return f"the body is not JSON ({first['ctx']['error']})"
    place = ".".join(clipped(str(part), _KEY_CHARACTERS) for part in first["loc"])
    return ": ".join(filter(None, (place, first["msg"])))


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
