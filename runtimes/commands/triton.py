"""`ettin-triton`: writes artifacts into a model repository of Triton Inference Server, and starts a server on it."""

import signal
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import click

from ettin.artifacts.errors import ServerError, UsageError
from ettin.runtimes.commands import console
from ettin.runtimes.hub import located
from ettin.runtimes.loading import checked_device, checked_manifest
from ettin.runtimes.triton.repository import TritonOptions, publish


def _checked_address(_: click.Context, __: click.Parameter, address: str) -> str:
    """Raises `UsageError` for all that tritonserver's HTTP server would take, and then not listen on."""
    try:
        return str(IPv4Address(address))
    except ValueError:
        raise UsageError(
            f"--address is '{address}', expected an IPv4 address without a port, such as 127.0.0.1 or 0.0.0.0: "
            "tritonserver serves HTTP on no other. Ports: --http-port, --grpc-port, --metrics-port"
        ) from None


@click.command(
    epilog=console.example_epilog(
        "ettin-triton ettin-reranker-demo/openvino-int8 --repository models --serve",
        "ettin-triton ettin-reranker-68m-v1/trt-bf16 --repository models --native",
    )
)
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path), metavar="[ARTIFACT]...")
@click.option("--repository", required=True, type=click.Path(path_type=Path), help="Model repository; made if needed.")
@click.option("--name", help="Name of the model, for one artifact.  [default: checkpoint, target and precision]")
@click.option(
    "--native", is_flag=True, help="Run the engine in Triton's own backend (onnxruntime, openvino, tensorrt)."
)
@click.option(
    "--instances", type=click.IntRange(1), default=1, show_default=True, help="Instances of the engine, with --native."
)
@click.option("--environment", help="Virtual environment of the model, as the server sees it.  [default: the server's]")
@click.option("--response-cache", is_flag=True, help="Let Triton answer equal requests from its cache.")
@console.PRECISION
@console.DEVICE
@console.THREADS
@console.STREAMS
@console.MAX_LENGTH
@console.long_documents
@click.option(
    "--key", "trusted_key", type=click.Path(path_type=Path), help=f"{console.KEY_HELP} The server checks it, too."
)
@click.option("--serve", is_flag=True, help="Then start the Triton server that the 'triton' extra installs.")
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    callback=_checked_address,
    help="With --serve: IPv4 address to listen on.",
)
@click.option("--http-port", type=int, default=8000, show_default=True, help="With --serve: HTTP port.")
@click.option("--grpc-port", type=int, default=8001, show_default=True, help="With --serve: gRPC port.")
@click.option("--metrics-port", type=int, default=8002, show_default=True, help="With --serve: port of the metrics.")
def command(
    artifacts: tuple[Path, ...], repository: Path, name: str | None, native: bool, instances: int,
    environment: str | None, response_cache: bool, trusted_key: Path | None, serve: bool, address: str,
    http_port: int, grpc_port: int, metrics_port: int, **settings: Any,
) -> None:  # fmt: skip
    """Write ARTIFACTs into a model repository. Each model takes 'query' and 'documents' and gives 'scores'.

    An artifact of a model that is already there becomes its next version; the earlier versions stay.
    """
    if not artifacts and not serve:
        raise UsageError("nothing to do: name an ARTIFACT, or --serve the repository")
    if name and len(artifacts) > 1:
        raise UsageError(f"--name is for one artifact, {len(artifacts)} are named")
    if instances > 1 and not native:
        raise UsageError("--instances is for --native: our runtime has --streams")
    if native and (settings["threads"] or settings["streams"]):
        raise UsageError("--threads and --streams are for our runtime: with --native there are --instances")
    runtime = {key: str(value) for key, value in settings.items() if value is not None}
    folders = [located(artifact) for artifact in artifacts]
    checked = [(folder, checked_manifest(folder, trusted_key, settings["precision"])) for folder in folders]
    for artifact, manifest in checked:
        device = checked_device(manifest, settings["device"])
        options = TritonOptions(
            native=native,
            on_gpu=device != "cpu",
            instances=instances,
            environment=environment,
            response_cache=response_cache,
            runtime=runtime,
            trusted_key=trusted_key,
        )
        model = name or manifest.full_name
        with console.step(f"publish {model}"):
            version = publish(artifact, repository, model, options)
        click.echo(repository / model / str(version))
        if native and manifest.engine is not None:
            needs = manifest.needs
            console.note(f"the server must have {needs.package} {needs.version}, which made the engine")
    if serve:
        _serve(repository, address, http_port, grpc_port, metrics_port)


def _serve(repository: Path, address: str, http_port: int, grpc_port: int, metrics_port: int) -> None:
    """Runs a Triton server until it ends or is told to."""
    from ettin.runtimes.triton.server import TritonServer

    server = TritonServer(
        repository, address=address, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise tritonserver would outlive this process
    try:
        with console.step("start tritonserver"):
            server.start()
            server.wait_ready()
        console.note(f"serving on {server.url} (gRPC {grpc_port}, metrics {metrics_port}); Ctrl-C ends it")
        raise ServerError(f"tritonserver ended with exit code {server.wait()}: {server.last_error()}")
    except KeyboardInterrupt:
        console.note("stopping")
    finally:
        server.stop()


main = partial(console.run, command, publishes=True)
