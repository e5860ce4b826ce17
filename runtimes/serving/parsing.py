"""Request bodies → checked requests, at a cost that a hostile body can't raise far above that of a good one."""

import re
from http import HTTPStatus
from typing import TypeVar

from pydantic import ValidationError

from ettin.runtimes.serving.answers import Refused, clipped
from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.schemas import RerankRequest, TeiRequest

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
