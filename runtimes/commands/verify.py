"""`ettin-verify`: proves an artifact on this machine."""

from pathlib import Path
from typing import NoReturn

import click

from ettin.artifacts.errors import OutputError, ParityError
from ettin.artifacts.manifest import Arithmetic, Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.signatures import SIGNATURE_NAME, read_private_key
from ettin.runtimes.commands import console
from ettin.runtimes.verify import Verification, adopt_engine, record_verified, verify


@click.command(
    epilog=console.example_epilog(
        "ettin-verify ettin-reranker-demo/openvino-int8",
        "ettin-verify ettin-reranker-demo/openvino-int8 --sign key.pem",
        "ettin-verify ettin-reranker-demo/openvino-int8 --key key.pub",
    )
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--device", help="cpu or cuda.  [default: what the artifact is for]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option("--key", type=click.Path(path_type=Path), help=console.KEY_HELP)
@click.option("--sign", type=click.Path(path_type=Path), help="Private key (PEM) to sign it with if it passes.")
def command(artifact: Path, device: str | None, threads: int | None, key: Path | None, sign: Path | None) -> None:
    """Compare an artifact's scores with its reference, here.

    The pairs and the reference's scores travel in the artifact, so this needs the engine and nothing else. Exit code 0:
    within the tolerance. An artifact exported with --allow-unverified can be loaded after it passed once; one exported
    on a machine with other arithmetic runs in this one's, if that is faster, after it passed once.
    """
    if sign is not None:
        read_private_key(sign)
    with OpenArtifact(artifact, trusted_key=key) as opened:
        is_signed = opened.signature is not None
    if adopt_engine(artifact, key):
        console.note("  the kit's engine is here: recorded in manifest.json")
        key = None  # the kit was signed; with its engine it is another artifact
    with console.step("verify"):
        found = verify(artifact, device=device, threads=threads, trusted_key=key)
    _report(found)
    if not found.ok:
        raise ParityError(f"{artifact}: scores differ from the reference: {found.summary}; limit: {found.rule}")
    if Manifest.read(artifact).parity.status == "unverified":
        record_verified(artifact, found)
        click.echo("marked as verified in manifest.json")
        if is_signed and sign is None:
            console.note(
                f"the signature no longer fits the manifest. Sign again: ettin-verify {artifact} --sign KEY",
                fg="yellow",
            )
        key = None  # for what was signed is proven, and is another artifact now
    click.echo(f"ok ({found.rule})")
    unproven = found.unproven
    if unproven and is_signed and sign is None:
        click.echo(
            f"{unproven.description} is not tried: recording it would break the signature. Do both with --sign KEY"
        )
    elif unproven:
        _try_unproven(artifact, found, unproven, device, threads, key)
    if sign is not None:
        with OpenArtifact(artifact) as opened:
            opened.sign(sign)
        click.echo(f"signed: {SIGNATURE_NAME}")


def _try_unproven(
    artifact: Path, found: Verification, unproven: Arithmetic, device: str | None, threads: int | None, key: Path | None
) -> None:
    with console.step(f"verify {unproven.description}"):
        faster = verify(artifact, device=device, threads=threads, unproven=True, trusted_key=key)
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
