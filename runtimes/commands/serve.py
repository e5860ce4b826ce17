"""`ettin-serve`: an artifact behind HTTP, for machines that have nothing else."""

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

import click

from ettin.artifacts.errors import MissingDependency, ServerError, UsageError
from ettin.runtimes.commands import console
from ettin.runtimes.loading import load

_KEY = "ETTIN_API_KEY"


@click.command(
    epilog=console.example_epilog(
        "ettin-serve ettin-reranker-demo/openvino-int8",
        "ettin-serve ettin-reranker-68m-v1/openvino-int8 --host 0.0.0.0 --api-key-file key.txt",
        "ettin-serve --triton localhost:8001",
    )
)
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--triton", metavar="HOST:PORT", help="Pass requests to a Triton server (gRPC) instead.")
@click.option("--model", help="With --triton: the model's name there.  [default: the only one]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0: a free one.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where it runs.  [default: what it is for]")
@click.option("--key", type=click.Path(path_type=Path), help=console.KEY_HELP)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option("--streams", type=click.IntRange(1), help="Batches at a time.  [default: as many as threads]")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where OpenVINO keeps its compiled model.")
@click.option("--max-length", type=click.IntRange(3), help="Tokens that pairs are truncated to.")
@click.option(
    "--max-documents",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help="Maximum number of documents in one request.",
)
@click.option(
    "--max-text-characters",
    type=click.IntRange(1),
    default=1_000_000,
    show_default=True,
    help="Maximum number of characters in one query or document.",
)
@click.option(
    "--max-request-characters",
    type=click.IntRange(1),
    default=32 << 20,
    show_default=True,
    help="Maximum number of characters in all texts of one request.",
)
@click.option(
    "--max-body-mib",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Maximum size of one request body, in MiB.",
)
@click.option(
    "--total-body-mib",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Maximum size of all request bodies in memory, in MiB. Beyond it, the body that has been arriving "
    "for the longest time is refused with 503.",
)
@click.option(
    "--max-waiting-pairs",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Maximum number of queued pairs before the server answers 429.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Maximum number of requests in progress before the server answers 503. Health checks do not count, "
    "and idle connections are closed to make room.",
)
@click.option(
    "--header-timeout-s",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time in seconds for a request's header to arrive before the connection is closed.",
)
@click.option(
    "--body-timeout-s",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Time in seconds for a request's body to arrive before the server answers 408, and for a client "
    "to read an answer.",
)
@click.option(
    "--request-timeout-s",
    type=click.FloatRange(0, min_open=True),
    help="Time in seconds for a request to be scored before the server answers 504.  [default: no limit]",
)
@click.option(
    "--probe-timeout-s",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time in seconds without a scored batch before /health/live answers 503.",
)
@click.option(
    "--drain-s",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Time in seconds after SIGTERM in which requests are still accepted and /health/ready answers 503.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path, exists=True), help=f"Or {_KEY}.  [default: no key]")
@click.option("--name", "names", multiple=True, help="Another name that clients may call the model; repeatable.")
@click.option("--log-level", type=click.Choice(["warning", "info"]), default="info", help="info: a line a request.")
def command(
    artifact: Path | None, triton: str | None, model: str | None, host: str, port: int, device: str | None,
    key: Path | None, threads: int | None, streams: int | None, cache_dir: Path | None, max_length: int | None,
    max_documents: int,
    max_text_characters: int, max_request_characters: int, max_body_mib: int, total_body_mib: int,
    max_waiting_pairs: int, max_connections: int, header_timeout_s: float, body_timeout_s: float,
    request_timeout_s: float | None, probe_timeout_s: float, drain_s: float, api_key_file: Path | None,
    names: tuple[str, ...], log_level: str,
) -> None:  # fmt: skip
    """Serve ARTIFACT over HTTP. Requests of all clients share batches.

    /rerank is text-embeddings-inference's route, /v1/rerank and /v2/rerank are Jina's and Cohere's. Also: /health,
    /health/live, /health/ready, /info, /metrics (Prometheus), /docs (OpenAPI).
    """
    if (artifact is None) == (triton is None):
        raise UsageError("expected an ARTIFACT or --triton HOST:PORT, one of them")
    if triton is not None and (key or request_timeout_s):
        raise UsageError("--key and --request-timeout-s are for an ARTIFACT: the Triton server has its own")
    try:
        from ettin.runtimes.serving.backends import Backend, LocalBackend, TritonBackend
        from ettin.runtimes.serving.bodies import Limits
        from ettin.runtimes.serving.server import raise_file_limit, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise MissingDependency("ettin-serve", str(error.name), "serve") from None
    api_key = _api_key(api_key_file)
    if total_body_mib < max_body_mib:
        raise UsageError(f"--total-body-mib is {total_body_mib}, expected at least --max-body-mib, {max_body_mib}")
    limits = Limits(
        max_body_bytes=max_body_mib << 20, total_body_bytes=total_body_mib << 20, max_documents=max_documents,
        max_text_characters=max_text_characters, max_request_characters=max_request_characters,
        max_connections=max_connections, header_timeout_s=header_timeout_s, body_timeout_s=body_timeout_s,
        probe_timeout_s=probe_timeout_s,
    )  # fmt: skip
    raise_file_limit(limits)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=log_level.upper())

    async def run(listening: socket.socket, backend: Backend | None) -> None:
        if backend is None:
            assert triton is not None  # noqa: S101 (checked above)
            backend = TritonBackend(triton, model or await TritonBackend.only_model(triton))
        address = f"[{host}]" if ":" in host else host
        where = f"http://{address}:{listening.getsockname()[1]}"
        console.note(f"{backend.name} ({backend.description}) on {where}; Ctrl-C ends it")
        await serve(listening, backend, limits, api_key=api_key, names=names, drain_s=drain_s)

    with _listening(host, port) as listening:
        local: Backend | None = None
        if artifact is not None:
            with console.step(f"load {artifact}"):
                runtime = load(
                    artifact, device=device, threads=threads, streams=streams, cache_dir=cache_dir,
                    max_length=max_length, trusted_key=key,
                )  # fmt: skip
                local = LocalBackend(runtime, max_waiting_pairs, request_timeout_s)
        asyncio.run(run(listening, local))


def _listening(host: str, port: int) -> socket.socket:
    """Before the model is loaded, which takes longer.

    Raises:
        ServerError: the port is taken, or the address is not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServerError(f"can't listen on {host}:{port} ({error.strerror}). Choose another: --port PORT") from None


def _api_key(file: Path | None) -> str | None:
    """The key from the file or the environment; None: neither is given.

    Raises:
        UsageError: it is empty, so nobody or everybody would get in.
    """
    key = file.read_text(encoding="utf-8") if file is not None else os.environ.get(_KEY)
    if key is not None and not key.strip():
        raise UsageError(f"the API key ({file or _KEY}) is empty")
    return key.strip() if key is not None else None


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
