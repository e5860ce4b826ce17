"""The HTTP service: routes that clients of text-embeddings-inference, Cohere and Jina already speak."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ettin.artifacts.errors import Busy, Closed, EttinError, Expired, InputError
from ettin.artifacts.versions import installed_version
from ettin.runtimes.activation import sigmoid
from ettin.runtimes.request import Scored
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.gate import Gate, Limits, Metrics, failure
from ettin.runtimes.serving.schemas import (
    Document,
    Failure,
    Info,
    RerankHit,
    RerankRequest,
    RerankResponse,
    TeiHit,
    TeiRequest,
    Usage,
)

_FAILURES: dict[int | str, dict[str, Any]] = {code: {"model": Failure} for code in (401, 404, 413, 422, 429, 500, 503)}

_KINDS: dict[int, str] = {HTTPStatus.NOT_FOUND: "not_found", HTTPStatus.SERVICE_UNAVAILABLE: "unhealthy"}


class _Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: why.
    """

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _ClientLeft(Exception):
    """Nobody waits for the answer."""


def create_app(
    backend: Backend, limits: Limits | None = None, api_key: str | None = None, names: Sequence[str] = ()
) -> FastAPI:
    """The service.

    Args:
        backend: what scores; closed when the service ends.
        limits: of a request.
        api_key: see `Gate`.
        names: that clients may call the model by, besides its own.
    """
    limits = limits or Limits()
    metrics = Metrics(backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPI(
        title="Ettin reranker", version=installed_version("ettin-export"), lifespan=lifespan, responses=_FAILURES
    )
    app.add_middleware(Gate, limits=limits, api_key=api_key, metrics=metrics)
    _add_error_handlers(app)

    async def scored(request: Request, query: str, documents: Sequence[str]) -> Scored:
        if len(documents) > limits.max_documents:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{len(documents)} documents, limit {limits.max_documents}. Send fewer at a time",
            )
        found = await _unless_left(request, backend.score(query, documents))
        metrics.documents.inc(len(documents))
        request.scope["ettin"] = {"documents": len(documents), "tokens": int(found.tokens.sum())}
        return found

    @app.post("/rerank", response_model_exclude_none=True, summary="text-embeddings-inference's route")
    async def tei(request: Request, body: TeiRequest) -> list[TeiHit]:
        found = await scored(request, body.query, body.texts)
        if body.truncate is False and backend.max_length:
            for at in np.flatnonzero(found.tokens >= backend.max_length):
                text = f"texts.{at}: fills the {backend.max_length} tokens of the model"
                raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        values = (found.logits if body.raw_scores else sigmoid(found.logits)).tolist()
        return [
            TeiHit(index=at, score=values[at], text=body.texts[at] if body.return_text else None)
            for at in _best_first(found)
        ]

    @app.post("/v1/rerank", response_model_exclude_none=True, summary="Jina's route, and Cohere's first")
    @app.post("/v2/rerank", response_model_exclude_none=True, summary="Cohere's second route")
    async def rerank(request: Request, body: RerankRequest) -> RerankResponse:
        if body.model is not None and body.model not in (backend.name, *names):
            served = ", ".join((backend.name, *names))
            raise _Refused(HTTPStatus.NOT_FOUND, f"model '{body.model}' is not served here, which has: {served}")
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        found = await scored(request, body.query, texts)
        values, tokens = sigmoid(found.logits).tolist(), int(found.tokens.sum())
        hits = [
            RerankHit(
                index=at,
                relevance_score=values[at],
                document=Document(text=texts[at]) if body.return_documents else None,
            )
            for at in _best_first(found)[: body.top_n]
        ]
        version = request.url.path.split("/")[1].removeprefix("v")
        return RerankResponse(
            id=str(uuid.uuid4()),
            model=backend.name,
            results=hits,
            usage=Usage(total_tokens=tokens, prompt_tokens=tokens),
            meta={"api_version": {"version": version}, "billed_units": {"search_units": 1}},
        )

    @app.get("/health", summary="200 when requests can be answered")
    async def health() -> dict[str, str]:
        if not await backend.is_ready():
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the model is not ready")
        return {"status": "ok"}

    @app.get("/info", summary="What is served")
    async def info() -> Info:
        return Info(
            model_id=backend.name,
            model_type={"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            max_input_length=backend.max_length,
            max_client_batch_size=limits.max_documents,
            runtime=backend.description,
            version=installed_version("ettin-export"),
        )

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _best_first(found: Scored) -> list[int]:
    """By logit: a sigmoid in float32 makes ties of what differs."""
    return sorted(range(len(found.logits)), key=lambda at: found.logits[at], reverse=True)


async def _unless_left(request: Request, scoring: Any) -> Scored:
    """Scores; stops when the client hangs up.

    Raises:
        _ClientLeft: it did.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(scoring), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _ClientLeft
        found: Scored = work.result()
        return found
    finally:
        work.cancel()
        left.cancel()


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(_Refused)
    async def refused(_: Request, error: _Refused) -> Response:
        return failure(error.status, str(error), _KINDS.get(error.status, "validation"))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # its "input" would repeat the client's text
        if first["type"] == "json_invalid":
            text = f"the body is not JSON (character {first['loc'][-1]}: {first['ctx']['error']})"
        else:
            text = ": ".join(filter(None, (".".join(str(part) for part in first["loc"][1:]), first["msg"])))
        return failure(HTTPStatus.UNPROCESSABLE_ENTITY, text, "validation")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.BAD_REQUEST:  # FastAPI's word for bytes that are no text
            return failure(HTTPStatus.UNPROCESSABLE_ENTITY, "the body is not JSON in UTF-8", "validation")
        return failure(error.status_code, str(error.detail), _KINDS.get(error.status_code, "validation"))

    @app.exception_handler(InputError)
    async def unfit(_: Request, error: InputError) -> Response:
        return failure(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), "validation")

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        headers = {"Retry-After": str(error.retry_after_s)}
        return failure(HTTPStatus.TOO_MANY_REQUESTS, str(error), "overloaded", headers)

    @app.exception_handler(Closed)
    async def closed(_: Request, error: Closed) -> Response:
        return failure(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "overloaded", {"Retry-After": "5"})

    @app.exception_handler(Expired)
    async def expired(_: Request, error: Expired) -> Response:
        return failure(HTTPStatus.GATEWAY_TIMEOUT, str(error), "overloaded")

    @app.exception_handler(EttinError)
    async def failed(_: Request, error: EttinError) -> Response:
        return failure(HTTPStatus.BAD_GATEWAY, str(error), "backend")

    @app.exception_handler(_ClientLeft)
    async def left(_: Request, error: _ClientLeft) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx' number for it, in log and metrics

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}", "backend")
