"""`ettin-verify`: proves an artifact on this machine."""

from pathlib import Path
from typing import NoReturn

import click

from ettin.artifacts.errors import ParityError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes import console
from ettin.runtimes.verify import adopt_engine, record_verified, verify


@click.command(epilog=console.example_epilog("ettin-verify ettin-reranker-demo/openvino-int8"))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--device", help="cpu or cuda.  [default: what the artifact is for]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
def command(artifact: Path, device: str | None, threads: int | None) -> None:
    """Compare an artifact's scores with its reference, here.

    The pairs and the reference's scores travel in the artifact, so this needs the engine and nothing else. Exit code 0:
    within the tolerance. An artifact exported with --allow-unverified can be loaded after it passed once.
    """
    if adopt_engine(artifact):
        console.note("  the kit's engine is here: recorded in manifest.json")
    with console.step("verify"):
        found = verify(artifact, device=device, threads=threads)
    click.echo(f"{found.runtime}: {found.summary}")
    click.echo(f"worst pair: {found.worst_pair}")
    if not found.ok:
        raise ParityError(f"{artifact}: scores differ from the reference: {found.summary}; limit: {found.rule}")
    if Manifest.read(artifact).parity.status == "unverified":
        record_verified(artifact, found)
        click.echo("marked as verified in manifest.json")
    click.echo(f"ok ({found.rule})")


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
