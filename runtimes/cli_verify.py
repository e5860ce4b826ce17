"""`ettin-verify`: proves an artifact on this machine."""

from pathlib import Path
from typing import NoReturn

import click

from ettin.artifacts.errors import OutputError, ParityError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes import console
from ettin.runtimes.verify import Verification, adopt_engine, record_verified, verify


@click.command(epilog=console.example_epilog("ettin-verify ettin-reranker-demo/openvino-int8"))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--device", help="cpu or cuda.  [default: what the artifact is for]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
def command(artifact: Path, device: str | None, threads: int | None) -> None:
    """Compare an artifact's scores with its reference, here.

    The pairs and the reference's scores travel in the artifact, so this needs the engine and nothing else. Exit code 0:
    within the tolerance. An artifact exported with --allow-unverified can be loaded after it passed once; one exported
    on a machine with other arithmetic runs in this one's, if that is faster, after it passed once.
    """
    if adopt_engine(artifact):
        console.note("  the kit's engine is here: recorded in manifest.json")
    with console.step("verify"):
        found = verify(artifact, device=device, threads=threads)
    _report(found)
    if not found.ok:
        raise ParityError(f"{artifact}: scores differ from the reference: {found.summary}; limit: {found.rule}")
    if Manifest.read(artifact).parity.status == "unverified":
        record_verified(artifact, found)
        click.echo("marked as verified in manifest.json")
    click.echo(f"ok ({found.rule})")
    if found.unproven:
        with console.step(f"verify {found.unproven}"):
            faster = verify(artifact, device=device, threads=threads, unproven=True)
        _report(faster)
        if not faster.ok:
            click.echo(f"not within {faster.rule}: not used, {found.runtime.split(';')[0]} is")
            return
        try:
            record_verified(artifact, faster)
            click.echo("ok, recorded in manifest.json: used here from now on")
        except OutputError as error:  # the artifact is good as it is: no failure
            click.echo(f"ok, but not recorded, so not used: {error}")


def _report(found: Verification) -> None:
    click.echo(f"{found.runtime}: {found.summary}")
    click.echo(f"worst pair: {found.worst_pair}")


def main() -> NoReturn:
    """Entry point."""
    console.run(command)
