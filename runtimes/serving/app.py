"""The HTTP service: routes that clients of text-embeddings-inference, Cohere and Jina already speak."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ettin.artifacts.errors import Busy, Closed, EttinError, Expired, InputError
from ettin.runtimes.arguments import sigmoid
from ettin.runtimes.machine import installed_version
from ettin.runtimes.request import Scored
from ettin.runtimes.serving.answers import ClientLeft, Refused, clipped, failure, internal_failure
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import Bodies, Limits, parsed
from ettin.runtimes.serving.gate import Gate, Metrics
from ettin.runtimes.serving.health import Health
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

_FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure} for code in (401, 404, 405, 408, 413, 415, 422, 429, 500, 502, 503)
}
_SMALL_BYTES = 1 << 16  # parsed at once: a thread would cost more

_Request = TypeVar("_Request", TeiRequest, RerankRequest)


def create_app(
    backend: Backend,
    limits: Limits | None = None,
    api_key: str | None = None,
    names: Sequence[str] = (),
    *,
    bodies: Bodies | None = None,
    health: Health | None = None,
) -> FastAPI:
    """The service.

    Args:
        backend: what scores; closed when the service ends.
        limits: of requests and connections.
        api_key: see `Gate`.
        names: that clients may call the model by, besides its own.
        bodies: request bodies in memory, shared with the connections they arrive on; None: the service's own.
        health: of the backend, told when the server drains; None: the service's own.
    """
    limits = limits or Limits()
    bodies, health = bodies or Bodies(limits), health or Health(backend, limits.probe_timeout_s)
    metrics = Metrics(backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPI(
        title="Ettin reranker", version=installed_version("ettin-export"), lifespan=lifespan, responses=_FAILURES
    )
    app.add_middleware(Gate, limits=limits, bodies=bodies, api_key=api_key, metrics=metrics)
    _add_error_handlers(app)
    _add_rerank_routes(app, backend, limits, metrics, names)
    _add_other_routes(app, backend, limits, metrics, health)
    return app


def _add_rerank_routes(app: FastAPI, backend: Backend, limits: Limits, metrics: Metrics, names: Sequence[str]) -> None:
    async def scored(request: Request, query: str, documents: Sequence[str], refuse_truncated: bool = False) -> Scored:
        found = await _unless_left(request, backend.score(query, documents, refuse_truncated))
        metrics.documents.inc(len(documents))
        request.scope["ettin"] |= {"documents": len(documents), "tokens": int(found.tokens.sum())}
        return found

    @app.post("/rerank", response_model_exclude_none=True, openapi_extra=_documented(TeiRequest),
              summary="text-embeddings-inference's route")  # fmt: skip
    async def tei(request: Request) -> list[TeiHit]:
        body = await _body(TeiRequest, request, limits)
        try:
            found = await scored(request, body.query, body.texts, body.truncate is False)
        except InputError as error:
            if body.truncate is not False:
                raise
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from None
        values = (found.logits if body.raw_scores else sigmoid(found.logits)).tolist()
        return [
            TeiHit(index=at, score=values[at], text=body.texts[at] if body.return_text else None)
            for at in _best_first(found)
        ]

    documented = _documented(RerankRequest)

    @app.post("/v1/rerank", response_model_exclude_none=True, openapi_extra=documented,
              summary="Jina's route, and Cohere's first")  # fmt: skip
    @app.post("/v2/rerank", response_model_exclude_none=True, openapi_extra=documented,
              summary="Cohere's second route")  # fmt: skip
    async def rerank(request: Request) -> RerankResponse:
        body = await _body(RerankRequest, request, limits)
        if body.model is not None and body.model not in (backend.name, *names):
            served = ", ".join((backend.name, *names))
            text = f"model '{clipped(body.model, 80)}' is not served here, which has: {served}"
            raise Refused(HTTPStatus.NOT_FOUND, text, "not_found")
        texts = body.passages
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
        version = request.scope["path"].split("/")[1].removeprefix("v")
        return RerankResponse(
            id=str(uuid.uuid4()),
            model=backend.name,
            results=hits,
            usage=Usage(total_tokens=tokens, prompt_tokens=tokens),
            meta={"api_version": {"version": version}, "billed_units": {"search_units": 1}},
        )


def _add_other_routes(app: FastAPI, backend: Backend, limits: Limits, metrics: Metrics, health: Health) -> None:
    @app.get("/health", summary="200 when requests can be answered")
    async def model_health() -> dict[str, str]:
        await health.check_model()
        return {"status": "ok"}

    @app.get("/health/live", summary="200 while the engine scores: restart the server otherwise")
    async def live() -> dict[str, str]:
        await health.check_live()
        return {"status": "ok"}

    @app.get("/health/ready", summary="200 while requests should be sent here")
    async def ready() -> dict[str, str]:
        await health.check_ready()
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


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    """The request body on the OpenAPI page: FastAPI does not parse it here, see `parsed`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # Document, which the answer brings
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _body(model: type[_Request], request: Request, limits: Limits) -> _Request:
    """The request; a large one is parsed in a thread.

    Raises:
        Refused: it is not one.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected the header Content-Type: application/json")
    body = request.scope["ettin.body"]
    if len(body) <= _SMALL_BYTES:
        return parsed(model, body, limits)
    request_model = await asyncio.to_thread(parsed, model, body, limits)
    body.clear()  # its texts are what is needed now
    return request_model


def _best_first(found: Scored) -> list[int]:
    """By logit: a sigmoid in float32 makes ties of what differs."""
    return sorted(range(len(found.logits)), key=lambda at: found.logits[at], reverse=True)


async def _unless_left(request: Request, scoring: Any) -> Scored:
    """Scores; stops when the client hangs up.

    Raises:
        ClientLeft: it did.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(scoring), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeft
        found: Scored = work.result()
        return found
    finally:
        work.cancel()
        left.cancel()


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.answer()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        kind = "not_found" if error.status_code == HTTPStatus.NOT_FOUND else "validation"
        return failure(error.status_code, str(error.detail), kind, error.headers)

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
    async def failed(request: Request, error: EttinError) -> Response:
        return internal_failure(request.scope, error, HTTPStatus.BAD_GATEWAY)
