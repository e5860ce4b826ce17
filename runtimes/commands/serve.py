"""`ettin-serve`: artifacts behind HTTP, for machines that have nothing else."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ettin.artifacts.errors import MissingDependency, ServerError, UsageError
from ettin.runtimes.commands import console
from ettin.runtimes.loading import load
from ettin.runtimes.long_documents import taken
from ettin.runtimes.serving.limits import Limits

if TYPE_CHECKING:
    from ettin.runtimes.serving.backends import Backend

_KEY_VARIABLE = "ETTIN_API_KEY"


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each limit."""
    for limit in reversed(fields(Limits)):
        numbers = click.IntRange(1) if isinstance(limit.default, int) else click.FloatRange(0, min_open=True)
        option = click.option(
            f"--{limit.name.replace('_', '-')}",
            type=type(numbers)(0) if limit.default == 0 else numbers,
            default=limit.default,
            show_default=True,
            help=limit.metadata["help"],
        )
        command = option(command)
    return command


@click.command(
    epilog=console.example_epilog(
        "ettin-serve ettin-reranker-demo/openvino-int8",
        "ettin-serve ettin-reranker-68m-v1/openvino-int8 --host 0.0.0.0 --api-key-file key.txt",
        "ettin-serve ettin-reranker-68m-v1/openvino-int8 ettin-reranker-17m-v1/openvino-int8",
        "ettin-serve --triton localhost:8001",
    )
)
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path), metavar="[ARTIFACT]...")
@click.option("--triton", metavar="HOST:PORT", help="Pass requests to a Triton server (gRPC) instead.")
@click.option("--model", help="With --triton: the model's name there.  [default: the only one]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on; 0: a free one."
)
@console.PRECISION
@console.DEVICE
@console.KEY
@console.THREADS
@console.STREAMS
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Folder in which OpenVINO keeps its compiled model.")
@console.MAX_LENGTH
@console.long_documents
@_limit_options
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"File with the API key that clients must send; {_KEY_VARIABLE} may have the key itself.  [default: no key]",
)
@click.option(
    "--name", "names", multiple=True, help="Another name that clients may call the (first) model; repeatable."
)
@click.option(
    "--activation",
    type=click.Choice(["sigmoid", "calibrated"]),
    default="sigmoid",
    show_default=True,
    help="How scores between 0 and 1 are made of logits, unless a request says otherwise.",
)
@click.option("--traces", metavar="URL", help="Send an OpenTelemetry span for each request there (OTLP over HTTP).")
@click.option(
    "--log-level",
    type=click.Choice(["warning", "info"]),
    default="info",
    show_default=True,
    help="info: also log a line for each request.",
)
def command(
    artifacts: tuple[Path, ...], triton: str | None, model: str | None, host: str, port: int, api_key_file: Path | None,
    names: tuple[str, ...], activation: str, traces: str | None, log_level: str, **options: Any,
) -> None:  # fmt: skip
    """Serve each ARTIFACT over HTTP. Requests of all clients share batches; `model` in a request chooses the artifact.

    /rerank is the route of text-embeddings-inference, vLLM and Infinity, /v1/rerank and /v2/rerank are Jina's and
    Cohere's. Also: /health, /health/live, /health/ready, /info, /metrics (Prometheus), /docs (OpenAPI).
    """
    if bool(artifacts) == (triton is not None):
        raise UsageError("expected an ARTIFACT or --triton HOST:PORT, one of them")
    limits = Limits(**{limit.name: options.pop(limit.name) for limit in fields(Limits)})
    policy = taken(options)
    if triton is not None and activation == "calibrated":
        raise UsageError(
            "--activation calibrated is for an ARTIFACT: with --triton, there are logits and no calibration"
        )
    if model is not None and triton is None:
        raise UsageError("--model is for --triton. Another name for an artifact is --name")
    if triton is not None:
        _refuse_local({**options, "request_timeout_s": limits.request_timeout_s, "cached_scores": limits.cached_scores})
    try:
        from ettin.runtimes.serving.app import create_app
        from ettin.runtimes.serving.backends import Backend, LocalBackend, TritonBackend
        from ettin.runtimes.serving.rerank import Defaults
        from ettin.runtimes.serving.server import serve
        from ettin.runtimes.serving.traces import Traces
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise MissingDependency("ettin-serve", str(error.name), "serve") from None
    api_key, sink = _api_key(api_key_file), Traces(traces) if traces else None
    limits.raise_file_limit()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=log_level.upper())

    async def run(listening: socket.socket, backends: list[Backend]) -> None:
        if triton is not None:
            backends = [TritonBackend(triton, model or await TritonBackend.only_model(triton))]
        by_name = _by_name(backends, names)
        uncalibrated = [each.name for each in backends if each.calibration is None]
        if activation == "calibrated" and uncalibrated:
            raise UsageError(f"--activation: no calibration in {', '.join(uncalibrated)}. Run first: ettin-calibrate")
        app = create_app(by_name, limits, api_key, Defaults(policy, activation), sink)
        address = f"[{host}]" if ":" in host else host
        served = ", ".join(f"{backend.name} ({backend.description})" for backend in backends)
        console.note(f"{served} on http://{address}:{listening.getsockname()[1]}; Ctrl-C ends it")
        await serve(listening, app, limits)

    with _listening(host, port) as listening:
        local: list[Backend] = []
        for artifact in artifacts:
            with console.step(f"load {artifact}"):
                local.append(LocalBackend(load(artifact, **options), limits))
        asyncio.run(run(listening, local))


def _refuse_local(options: Mapping[str, Any]) -> None:
    """Raises `UsageError` if options are given that say how an artifact is run in this process."""
    given = [f"--{name.replace('trusted_', '').replace('_', '-')}" for name, value in options.items() if value]
    if given:
        listed = ", ".join(sorted(given))
        raise UsageError(f"{listed}: for an ARTIFACT, not for --triton. The Triton server has settings of its own")


def _by_name(backends: "list[Backend]", names: tuple[str, ...]) -> "dict[str, Backend]":
    """The backends by all names that clients may use, the first one first."""
    pairs = [*((each.name, each) for each in backends), *((name, backends[0]) for name in names)]
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        raise UsageError(f"two models have the same name: {', '.join(name for name, _ in pairs)}. Serve one of them")
    return by_name


def _listening(host: str, port: int) -> socket.socket:
    """Listens before the model is loaded, so that a port in use is reported at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServerError(f"can't listen on {host}:{port} ({error.strerror}). Choose another: --port PORT") from None


def _api_key(file: Path | None) -> str | None:
    """The key from the file or the environment; an empty one is refused, which nobody or everybody would have."""
    try:
        key = file.read_text(encoding="utf-8") if file is not None else os.environ.get(_KEY_VARIABLE)
    except UnicodeDecodeError:
        raise UsageError(f"the API key in {file} is not text in UTF-8") from None
    if key is not None and not key.strip():
        raise UsageError(f"the API key ({file or _KEY_VARIABLE}) is empty")
    return key.strip() if key is not None else None


main = partial(console.run, command)
