"""The HTTP service: the routes that clients of text-embeddings-inference, Cohere and Jina already use."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ettin.artifacts.errors import EttinError
from ettin.runtimes.machine import installed_version
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import Bodies
from ettin.runtimes.serving.gate import PROBES, Gate, Health, Metrics
from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.messages import Failure, Info, Refused, RerankRequest, answer_to_error
from ettin.runtimes.serving.page import PAGE_HEADERS, page
from ettin.runtimes.serving.rerank import ROUTES, Defaults, Rerank
from ettin.runtimes.serving.traces import Traces

_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure} for status in (401, 404, 405, 408, 413, 415, 422, 429, 500, 502, 503)
}


def create_app(
    backends: Mapping[str, Backend],
    limits: Limits | None = None,
    api_key: str | None = None,
    defaults: Defaults | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """The service. Its `state` has `bodies` and `health`, which the server shares.

    Args:
        backends: score the documents, by all names that clients may use; the first is for requests without a model.
            Closed when the service ends.
        limits: of requests and connections.
        api_key: see `Gate`.
        defaults: for requests that do not say otherwise.
        traces: where spans are sent; None: nowhere.
    """
    limits, engines = limits or Limits(), list(dict.fromkeys(backends.values()))
    bodies, health, metrics = Bodies(limits), Health(engines, limits.probe_timeout_s), Metrics(engines)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(engine.close() for engine in engines))
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="Ettin reranker",
        version=installed_version("ettin-export"),
        lifespan=lifespan,
        responses=_FAILURES,
        exception_handlers=dict.fromkeys((Refused, HTTPException, EttinError), _answer_to_error),
        docs_url=None,  # FastAPI's pages load scripts from a CDN
        redoc_url=None,
    )
    app.state.bodies, app.state.health = bodies, health
    app.add_middleware(Gate, limits=limits, bodies=bodies, api_key=api_key, metrics=metrics, traces=traces)
    answer = Rerank(backends, limits, metrics, defaults or Defaults()).answer
    for path, summary in ROUTES.items():
        app.post(path, response_model_exclude_none=True, openapi_extra=_documented_body(), summary=summary)(answer)
    _add_other_routes(app, backends, limits, metrics, health)
    return app


def _add_other_routes(
    app: FastAPI, backends: Mapping[str, Backend], limits: Limits, metrics: Metrics, health: Health
) -> None:
    async def ok() -> dict[str, str]:
        return {"status": "ok"}

    checks = (health.check_model, health.check_live, health.check_ready)
    summaries = (
        "200 when the models are loaded",
        "200 while the engines score: restart the server otherwise",
        "200 while requests should be sent here",
    )
    for path, check, summary in zip(PROBES, checks, summaries, strict=True):
        app.get(path, summary=summary, dependencies=[Depends(check)])(ok)

    @app.get("/info", summary="The served models, and the one for requests without a model")
    async def info() -> Info:
        backend = next(iter(backends.values()))
        return Info(
            model_id=backend.name,
            model_type={"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            max_input_length=backend.max_length,
            max_client_batch_size=limits.max_documents,
            runtime=backend.description,
            models=list(backends),
            version=installed_version("ettin-export"),
        )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers=PAGE_HEADERS)

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _documented_body() -> dict[str, Any]:
    """Describes the request body on the OpenAPI page: FastAPI does not parse it here, see `parsed`."""
    schema = RerankRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # Document, which the answer brings
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _answer_to_error(request: Request, error: Exception) -> Response:
    """Answers here and not in the gate, so that the body is counted until the client has its answer."""
    return answer_to_error(error, request.scope["ettin"]["id"])
