"""Errors of the HTTP service as its clients see them: one bounded line, without internals."""

import json
import logging
import traceback
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import Scope

LOG = logging.getLogger("ettin.serve")
_MOST_CHARACTERS = 400  # of a message: it may repeat a key or a name that the client chose
CLOSE = {"Connection": "close"}


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what is wrong, for the client.
        kind: the error type that clients of text-embeddings-inference look for.
        headers: additional headers of the answer.
    """

    def __init__(
        self, status: int, message: str, kind: str = "validation", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def answer(self) -> Response:
        """The response."""
        return failure(self.status, str(self), self.kind, self.headers)


class ClientLeft(Exception):
    """The client closed its connection; nobody reads an answer."""


def failure(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as TEI's clients (`error`, `error_type`) and Cohere's (`message`) expect it, in ASCII."""
    text = clipped(message, _MOST_CHARACTERS)
    body = json.dumps({"error": text, "error_type": kind, "message": text})
    return Response(body, int(status), headers, "application/json")


def internal_failure(scope: Scope, error: Exception, status: HTTPStatus) -> Response:
    """An error whose reason is for the operator: the reason is logged with the request's id, the client gets the id."""
    identifier = scope["ettin"]["id"]
    trace = "".join(traceback.format_exception(error))
    LOG.error(json.dumps({"id": identifier, "error": f"{type(error).__name__}: {error}", "trace": trace}))
    return failure(status, f"the server failed to score this request; its log has the reason under {identifier}",
                   "backend")  # fmt: skip


def clipped(text: str, most_characters: int) -> str:
    """`text`, or its beginning."""
    return text if len(text) <= most_characters else text[: most_characters - 2] + " …"
