"""Requests and answers of the HTTP routes, errors included: each error is one bounded line without internals."""

import json
import logging
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ettin.artifacts.errors import Busy, Closed, EttinError, Expired, InputError

LOG = logging.getLogger("ettin.serve")
CLOSE = {"Connection": "close"}
TRUNCATED_HEADER = "X-Truncated-Documents"
_MAX_LISTED = 100
Meta = dict[str, dict[str, str | int] | list[str]]
_MAX_CHARACTERS = 400  # of an error: it may repeat a key or a name that the client chose


class _Strict(BaseModel):
    """Refuses an unknown key, which would otherwise be ignored silently."""

    model_config = ConfigDict(extra="forbid")


class Document(_Strict):
    """A document as an object."""

    text: str


class TeiHit(BaseModel):
    """One text and its score."""

    index: int
    score: float
    text: str | None = None


class RerankRequest(_Strict):
    """A request to any of the routes: `texts` as text-embeddings-inference has them, `documents` as Cohere and Jina."""

    model: str | None = Field(None, description="must be the name of a served model, if given")
    query: str
    # fail_fast: otherwise each wrong element costs an error of a kilobyte.
    texts: list[str] | None = Field(None, fail_fast=True, description="the answer is a list")
    documents: list[str | Document] | None = Field(None, fail_fast=True, description="the answer is an object")
    top_n: Annotated[int, Field(ge=1)] | None = Field(None, description="maximum number of results")
    return_text: bool | None = None
    return_documents: bool | None = Field(None, description="the same as return_text")
    raw_scores: bool = Field(False, description="logits instead of values between 0 and 1")
    activation: Literal["sigmoid", "calibrated"] | None = Field(None, description="calibrated: probabilities")
    truncate: bool | None = Field(None, description="false: an input that fills the model is refused, not cut")
    truncation_direction: Literal["Right", "right"] = "Right"
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = Field(None, description="documents are cut to it first")
    long_documents: Literal["truncate", "chunks"] | None = Field(None, description="for those that do not fit")
    chunk_overlap: Annotated[int, Field(ge=0)] | None = Field(None, description="tokens that neighbours share")
    top_chunks: Annotated[int, Field(ge=1)] | None = Field(None, description="best chunks whose mean is the score")

    @model_validator(mode="after")
    def _has_texts(self) -> Self:
        if (self.texts is None) == (self.documents is None):
            raise ValueError("expected 'documents' or 'texts', one of them")
        return self

    @property
    def passages(self) -> list[str]:
        """The documents."""
        documents = self.documents if self.texts is None else self.texts
        return [document if isinstance(document, str) else document.text for document in documents or []]

    @property
    def wants_texts(self) -> bool:
        """Whether the answer repeats the documents."""
        return bool(self.return_text or self.return_documents)


class RerankHit(BaseModel):
    """One document and its relevance, between 0 and 1."""

    index: int
    relevance_score: float
    document: Document | None = None


class Usage(BaseModel):
    """Number of tokens that were scored."""

    total_tokens: int
    prompt_tokens: int


class RerankResponse(BaseModel):
    """The documents, best first."""

    id: str
    model: str
    results: list[RerankHit]
    usage: Usage
    meta: Meta


class Info(BaseModel):
    """The served models; all but `models` is of the one for requests without a model."""

    model_id: str
    model_type: dict[str, dict[str, dict[str, int | str]]]
    max_input_length: int | None
    max_client_batch_size: int
    runtime: str
    models: list[str]
    version: str


class Failure(BaseModel):
    """Why a request failed: TEI's clients read `error` and `error_type`, Cohere's read `message`."""

    error: str
    error_type: str
    message: str


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


class ClientLeft(Exception):
    """The client closed its connection, so nobody reads an answer."""


def answer_to_error(error: Exception, request_id: str) -> Response:
    """The answer to a request that failed, in ASCII. An internal error is only logged, under the request's id."""
    message, kind, headers = str(error), "overloaded", None
    match error:
        case Refused():
            status, kind, headers = error.status, error.kind, error.headers
        case HTTPException():
            status, message, headers = error.status_code, str(error.detail), error.headers
            kind = "not_found" if status == HTTPStatus.NOT_FOUND else "validation"
        case InputError():
            status, kind = HTTPStatus.UNPROCESSABLE_ENTITY, "validation"
        case Busy():
            status, headers = HTTPStatus.TOO_MANY_REQUESTS, {"Retry-After": str(error.retry_after_s)}
        case Closed():
            status, headers = HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "5"}
        case Expired():
            status = HTTPStatus.GATEWAY_TIMEOUT
        case _:
            status = HTTPStatus.BAD_GATEWAY if isinstance(error, EttinError) else HTTPStatus.INTERNAL_SERVER_ERROR
            trace = "".join(traceback.format_exception(error))
            LOG.error(json.dumps({"id": request_id, "error": f"{type(error).__name__}: {error}", "trace": trace}))
            message = f"the server failed to score this request; its log has the reason under {request_id}"
            kind = "backend"
    text = clipped(message, _MAX_CHARACTERS)
    body = json.dumps({"error": text, "error_type": kind, "message": text})
    return Response(body, int(status), headers, "application/json")


def listed(indices: list[int]) -> str:
    """Indices of documents in one bounded line."""
    more = len(indices) - _MAX_LISTED
    return ", ".join(map(str, indices[:_MAX_LISTED])) + (f" and {more} more" if more > 0 else "")


def clipped(text: str, max_characters: int) -> str:
    """The text, or its beginning if it is longer."""
    return text if len(text) <= max_characters else text[: max_characters - 2] + " …"
