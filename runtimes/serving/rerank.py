"""The rerank routes: from the body of a request to the scores of a backend, in the shape that the client knows."""

import asyncio
import uuid
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import Request, Response

from ettin.artifacts.errors import InputError
from ettin.runtimes.arguments import Activation, calibrated, identity, sigmoid
from ettin.runtimes.long_documents import taken
from ettin.runtimes.request import Scored
from ettin.runtimes.serving.backends import Backend
from ettin.runtimes.serving.bodies import parsed
from ettin.runtimes.serving.gate import Metrics
from ettin.runtimes.serving.limits import Limits
from ettin.runtimes.serving.messages import (
    TRUNCATED_HEADER,
    ClientLeft,
    Document,
    Meta,
    Refused,
    RerankHit,
    RerankRequest,
    RerankResponse,
    TeiHit,
    Usage,
    clipped,
    listed,
)

ROUTES = {
    "/rerank": "The route of text-embeddings-inference, vLLM and Infinity",
    "/v1/rerank": "Jina's route, and version 1 of Cohere's",
    "/v2/rerank": "Version 2 of Cohere's route",
}
_SMALL_BYTES = 1 << 16  # a body of at most this size is parsed at once: a thread would cost more


@dataclass(frozen=True)
class Defaults:
    """What applies to requests that do not say otherwise.

    Args:
        long_documents: fields of `LongDocuments`.
        activation: "sigmoid" or "calibrated".
    """

    long_documents: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "sigmoid"


class Rerank:
    """Answers the rerank routes.

    Args:
        backends: by all names that clients may use; the first is for requests without a model.
        limits: of requests.
        metrics: counts documents and the time that requests wait.
        defaults: for requests that do not say otherwise.
    """

    def __init__(self, backends: Mapping[str, Backend], limits: Limits, metrics: Metrics, defaults: Defaults) -> None:
        self._backends, self._limits, self._metrics, self._defaults = backends, limits, metrics, defaults

    async def answer(self, request: Request, response: Response) -> list[TeiHit] | RerankResponse:
        """Best first: a list for `texts`, an object for `documents`."""
        body = await _body(request, self._limits)
        backend = self._backend(body)
        activation = _activation(body, backend, self._defaults)
        scored = await self._scored(request, body, backend)
        values = activation(scored.logits).tolist()
        order = np.argsort(-scored.logits, kind="stable")[: body.top_n].tolist()  # by logit: sigmoids may be equal
        passages = body.passages if body.wants_texts else None
        texts = {index: passages[index] if passages else None for index in order}
        truncated = listed(np.flatnonzero(scored.truncated).tolist())
        if truncated:
            response.headers[TRUNCATED_HEADER] = truncated
        if body.texts is not None:
            return [TeiHit(index=index, score=values[index], text=text) for index, text in texts.items()]
        version = "2" if request.scope["path"].startswith("/v2") else "1"
        meta: Meta = {"api_version": {"version": version}, "billed_units": {"search_units": 1}}
        if truncated:
            meta["warnings"] = [f"some tokens of these documents or of their query were not scored: {truncated}"]
        tokens = int(scored.tokens.sum())
        documents = {index: None if text is None else Document(text=text) for index, text in texts.items()}
        return RerankResponse(
            id=str(uuid.uuid4()),
            model=backend.name,
            results=[RerankHit(index=i, relevance_score=values[i], document=each) for i, each in documents.items()],
            usage=Usage(total_tokens=tokens, prompt_tokens=tokens),
            meta=meta,
        )

    def _backend(self, body: RerankRequest) -> Backend:
        name = next(iter(self._backends)) if body.model is None else body.model
        if name not in self._backends:
            text = f"model '{clipped(name, 80)}' is not served here, which has: {', '.join(self._backends)}"
            raise Refused(HTTPStatus.NOT_FOUND, text, "not_found")
        return self._backends[name]

    async def _scored(self, request: Request, body: RerankRequest, backend: Backend) -> Scored:
        policy, refuses = {**self._defaults.long_documents, **taken(dict(body))}, body.truncate is False
        try:
            scored = await _unless_left(request, backend.score(body.query, body.passages, policy, refuses))
        except InputError as error:
            if not refuses:
                raise
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from None
        facts = {"model": backend.name, "documents": len(scored.logits), "tokens": int(scored.tokens.sum())}
        for name, seconds in (("queue_ms", scored.queue_s), ("engine_ms", scored.engine_s)):
            if seconds is not None:
                facts[name] = round(1000 * seconds, 1)
        request.scope["ettin"] |= facts
        self._metrics.count(backend.name, scored)
        return scored


def _activation(body: RerankRequest, backend: Backend, defaults: Defaults) -> Activation:
    """The function from logits to what the client asked for."""
    name = "identity" if body.raw_scores else body.activation or defaults.activation
    if name != "calibrated":
        return identity if name == "identity" else sigmoid
    calibration = backend.calibration
    if calibration is None:
        text = f"activation: '{backend.name}' {backend.without_calibration}"
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, text)
    return partial(calibrated, calibration)


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
