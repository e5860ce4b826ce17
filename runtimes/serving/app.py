"""The HTTP service: the routes that clients of text-embeddings-inference, Cohere and Jina already use."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ettin.artifacts.errors import EttinError, InputError
from ettin.runtimes.arguments import sigmoid
from ettin.runtimes.machine import installed_version
from ettin.runtimes.request import Scored
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import Bodies, parsed
from ettin.runtimes.serving.gate import PROBES, Gate, Health, Metrics
from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.messages import (
    ClientLeft,
    Document,
    Failure,
    Info,
    Refused,
    RerankHit,
    RerankRequest,
    RerankResponse,
    TeiHit,
    TeiRequest,
    Usage,
    answer_to_error,
    clipped,
)

_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure} for status in (401, 404, 405, 408, 413, 415, 422, 429, 500, 502, 503)
}
_SMALL_BYTES = 1 << 16  # a body of at most this size is parsed at once: a thread would cost more

_Request = TypeVar("_Request", TeiRequest, RerankRequest)


def create_app(
    backend: Backend, limits: Limits | None = None, api_key: str | None = None, names: Sequence[str] = ()
) -> FastAPI:
    """The service. Its `state` has `bodies` and `health`, which the server shares.

    Args:
        backend: scores the documents; closed when the service ends.
        limits: of requests and connections.
        api_key: see `Gate`.
        names: that clients may call the model by, besides its own.
    """
    limits = limits or Limits()
    bodies, health, metrics = Bodies(limits), Health(backend, limits.probe_timeout_s), Metrics(backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPI(
        title="Ettin reranker",
        version=installed_version("ettin-export"),
        lifespan=lifespan,
        responses=_FAILURES,
        exception_handlers=dict.fromkeys((Refused, HTTPException, EttinError), _answer_to_error),
    )
    app.state.bodies, app.state.health = bodies, health
    app.add_middleware(Gate, limits=limits, bodies=bodies, api_key=api_key, metrics=metrics)
    _add_rerank_routes(app, backend, limits, metrics, names)
    _add_other_routes(app, backend, limits, metrics, health)
    return app


def _add_rerank_routes(app: FastAPI, backend: Backend, limits: Limits, metrics: Metrics, names: Sequence[str]) -> None:
    async def score(request: Request, query: str, documents: Sequence[str], refuse_truncated: bool = False) -> Scored:
        scored = await _unless_left(request, backend.score(query, documents, refuse_truncated))
        metrics.documents.inc(len(documents))
        request.scope["ettin"] |= {"documents": len(documents), "tokens": int(scored.tokens.sum())}
        return scored

    @app.post("/rerank", response_model_exclude_none=True, openapi_extra=_documented(TeiRequest),
              summary="text-embeddings-inference's route")  # fmt: skip
    async def tei(request: Request) -> list[TeiHit]:
        body = await _body(TeiRequest, request, limits)
        try:
            scored = await score(request, body.query, body.texts, body.truncate is False)
        except InputError as error:
            if body.truncate is not False:
                raise
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from None
        values = (scored.logits if body.raw_scores else sigmoid(scored.logits)).tolist()
        return [
            TeiHit(index=index, score=values[index], text=body.texts[index] if body.return_text else None)
            for index in _best_first(scored)
        ]

    @app.post("/v1/rerank", response_model_exclude_none=True, openapi_extra=_documented(RerankRequest),
              summary="Jina's route, and version 1 of Cohere's")  # fmt: skip
    @app.post("/v2/rerank", response_model_exclude_none=True, openapi_extra=_documented(RerankRequest),
              summary="Version 2 of Cohere's route")  # fmt: skip
    async def rerank(request: Request) -> RerankResponse:
        body = await _body(RerankRequest, request, limits)
        served = (backend.name, *names)
        if body.model is not None and body.model not in served:
            text = f"model '{clipped(body.model, 80)}' is not served here, which has: {', '.join(served)}"
            raise Refused(HTTPStatus.NOT_FOUND, text, "not_found")
        texts = body.passages
        scored = await score(request, body.query, texts)
        values, tokens = sigmoid(scored.logits).tolist(), int(scored.tokens.sum())
        hits = [
            RerankHit(
                index=index,
                relevance_score=values[index],
                document=Document(text=texts[index]) if body.return_documents else None,
            )
            for index in _best_first(scored)[: body.top_n]
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
    async def ok() -> dict[str, str]:
        return {"status": "ok"}

    checks = (health.check_model, health.check_live, health.check_ready)
    summaries = (
        "200 when the model is loaded",
        "200 while the engine scores: restart the server otherwise",
        "200 while requests should be sent here",
    )
    for path, check, summary in zip(PROBES, checks, summaries, strict=True):
        app.get(path, summary=summary, dependencies=[Depends(check)])(ok)

    @app.get("/info", summary="The served model")
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
    """Describes the request body on the OpenAPI page: FastAPI does not parse it here, see `parsed`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # Document, which the answer brings
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _body(model: type[_Request], request: Request, limits: Limits) -> _Request:
    """Parses the body of a request, in a thread if it is large."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected the header Content-Type: application/json")
    body = request.scope["ettin.body"]
    if len(body) <= _SMALL_BYTES:
        return parsed(model, body, limits)
    result = await asyncio.to_thread(parsed, model, body, limits)
    body.clear()  # its texts take its place
    return result


def _best_first(scored: Scored) -> list[int]:
    """Indices by logit: a sigmoid in float32 makes different logits equal."""
    return sorted(range(len(scored.logits)), key=lambda index: scored.logits[index], reverse=True)


async def _unless_left(request: Request, scoring: Coroutine[Any, Any, Scored]) -> Scored:
    """Scores, or raises `ClientLeft` when the client closes its connection before the end."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(scoring), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeft
        return work.result()
    finally:
        work.cancel()
        left.cancel()


async def _answer_to_error(request: Request, error: Exception) -> Response:
    """Answers here and not in the gate, so that the body is counted until the client has its answer."""
    return answer_to_error(error, request.scope["ettin"]["id"])
