"""The HTTP service: the routes that clients of text-embeddings-inference, Cohere and Jina already use."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ettin.artifacts.errors import EttinError, InputError
from ettin.runtimes.arguments import sigmoid
from ettin.runtimes.long_documents import LongDocuments
from ettin.runtimes.machine import installed_version
from ettin.runtimes.request import Scored
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import Bodies, parsed
from ettin.runtimes.serving.gate import PROBES, Gate, Health, Metrics
from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.messages import (
    TRUNCATED_HEADER,
    ClientLeft,
    Document,
    Failure,
    Info,
    Meta,
    Refused,
    RerankHit,
    RerankRequest,
    RerankResponse,
    TeiHit,
    Usage,
    answer_to_error,
    clipped,
    listed,
)

_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure} for status in (401, 404, 405, 408, 413, 415, 422, 429, 500, 502, 503)
}
_SMALL_BYTES = 1 << 16  # a body of at most this size is parsed at once: a thread would cost more

_ROUTES = {
    "/rerank": "text-embeddings-inference's route, and that of vLLM and Infinity",
    "/v1/rerank": "Jina's route, and version 1 of Cohere's",
    "/v2/rerank": "Version 2 of Cohere's route",
}


def create_app(
    backend: Backend,
    limits: Limits | None = None,
    api_key: str | None = None,
    names: Sequence[str] = (),
    long_documents: LongDocuments | None = None,
) -> FastAPI:
    """The service. Its `state` has `bodies` and `health`, which the server shares.

    Args:
        backend: scores the documents; closed when the service ends.
        limits: of requests and connections.
        api_key: see `Gate`.
        names: that clients may call the model by, besides its own.
        long_documents: what happens to documents that do not fit, unless a request says otherwise.
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
    _add_rerank_routes(app, backend, limits, metrics, names, long_documents or LongDocuments())
    _add_other_routes(app, backend, limits, metrics, health)
    return app


def _add_rerank_routes(
    app: FastAPI,
    backend: Backend,
    limits: Limits,
    metrics: Metrics,
    names: Sequence[str],
    long_documents: LongDocuments,
) -> None:
    async def score(request: Request, body: RerankRequest) -> Scored:
        policy = long_documents.updated(dict(body))
        try:
            scored = await _unless_left(
                request, backend.score(body.query, body.passages, policy, body.truncate is False)
            )
        except InputError as error:
            if body.truncate is not False:
                raise
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from None
        metrics.documents.inc(len(scored.logits))
        request.scope["ettin"] |= {"documents": len(scored.logits), "tokens": int(scored.tokens.sum())}
        return scored

    async def rerank(request: Request, response: Response) -> list[TeiHit] | RerankResponse:
        body = await _body(request, limits)
        served = (backend.name, *names)
        if body.model is not None and body.model not in served:
            text = f"model '{clipped(body.model, 80)}' is not served here, which has: {', '.join(served)}"
            raise Refused(HTTPStatus.NOT_FOUND, text, "not_found")
        scored = await score(request, body)
        values = (scored.logits if body.raw_scores else sigmoid(scored.logits)).tolist()
        order = np.argsort(-scored.logits, kind="stable")[: body.top_n].tolist()  # logits: sigmoids may be equal
        truncated = np.flatnonzero(scored.truncated).tolist()
        if truncated:
            response.headers[TRUNCATED_HEADER] = listed(truncated)
        passages = body.passages if body.wants_texts else None
        texts = {index: passages[index] if passages else None for index in order}
        if body.texts is not None:
            return [TeiHit(index=index, score=values[index], text=texts[index]) for index in order]
        tokens = int(scored.tokens.sum())
        hits = [
            RerankHit(
                index=index,
                relevance_score=values[index],
                document=None if text is None else Document(text=text),
            )
            for index, text in texts.items()
        ]
        version = "2" if request.scope["path"].startswith("/v2") else "1"
        meta: Meta = {"api_version": {"version": version}, "billed_units": {"search_units": 1}}
        if truncated:
            meta["warnings"] = [f"not all tokens of these documents or of their query were scored: {listed(truncated)}"]
        return RerankResponse(
            id=str(uuid.uuid4()),
            model=backend.name,
            results=hits,
            usage=Usage(total_tokens=tokens, prompt_tokens=tokens),
            meta=meta,
        )

    for path, summary in _ROUTES.items():
        app.post(path, response_model_exclude_none=True, openapi_extra=_documented(RerankRequest), summary=summary)(
            rerank
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


async def _body(request: Request, limits: Limits) -> RerankRequest:
    """Parses the body of a request, in a thread if it is large."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected the header Content-Type: application/json")
    body = request.scope["ettin.body"]
    if len(body) <= _SMALL_BYTES:
        return parsed(body, limits)
    result = await asyncio.to_thread(parsed, body, limits)
    body.clear()  # its texts take its place
    return result


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
