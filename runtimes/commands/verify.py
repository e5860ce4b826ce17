"""`ettin-verify`: proves an artifact on this machine."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import OutputError, ParityError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.precisions import in_precision, precisions
from ettin.artifacts.signatures import read_private_key
from ettin.runtimes.commands import console
from ettin.runtimes.hub import located
from ettin.runtimes.verify import Verification, adopt_engine, record_verified, verify


@click.command(
    epilog=console.example_epilog(
        "ettin-verify ettin-reranker-demo/openvino-int8",
        "ettin-verify ettin-reranker-demo/openvino-int8 --sign key.pem",
        "ettin-verify ettin-reranker-demo/openvino-int8 --key key.pub",
    )
)
@click.argument("artifact", type=click.Path(path_type=Path))
@console.PRECISION
@console.DEVICE
@console.THREADS
@console.KEY
@click.option("--sign", type=click.Path(path_type=Path), help="Private key (PEM) to sign the artifact if it passes.")
def command(
    artifact: Path, trusted_key: Path | None, sign: Path | None, precision: str | None, **settings: Any
) -> None:
    """Compare an artifact's scores with its reference, on this machine.

    The pairs and the reference's scores are in the artifact, so only the engine is needed. The exit code is 0 if the
    scores of all precisions in it (or of --precision) are within the tolerance. An artifact exported with
    --allow-unverified can be loaded after it has passed once. One that was exported on a machine with other arithmetic
    uses the arithmetic of this machine, if that is faster, after it has passed once.
    """
    if sign is not None:
        read_private_key(sign)
    artifact = located(artifact)
    with OpenArtifact(artifact, trusted_key=trusted_key) as opened:
        keeps_signature = opened.signature is not None and sign is None
    if adopt_engine(artifact, trusted_key):
        console.note("  the engine of the build kit is recorded in manifest.json")
        trusted_key = None  # the kit was signed; with its engine it is another artifact
    for one in precisions(Manifest.read(artifact)) if precision is None else (precision,):
        recorded = _verify_precision(artifact, keeps_signature, trusted_key=trusted_key, precision=one, **settings)
        trusted_key = None if recorded else trusted_key  # the signed artifact is proven; it is another artifact now
    console.sign(artifact, sign)


def _verify_precision(artifact: Path, keeps_signature: bool, **settings: Any) -> bool:
    """Verifies one precision, and marks it as verified if it was not; returns whether it did that."""
    is_new = in_precision(Manifest.read(artifact), settings["precision"]).parity.status == "unverified"
    verification = _verified("verify", artifact, **settings)
    if not verification.ok:
        difference = f"{verification.summary}; limit: {verification.parity.rule}"
        raise ParityError(f"{artifact}: scores differ from the reference: {difference}")
    if is_new:
        record_verified(artifact, verification)
        click.echo("marked as verified in manifest.json")
        if keeps_signature:
            text = f"the signature no longer fits the manifest. Sign again: ettin-verify {artifact} --sign KEY"
            console.note(text, fg="yellow")
        settings["trusted_key"] = None
    click.echo(f"ok ({verification.parity.rule})")
    if verification.unproven and keeps_signature:
        reason = "recording it would invalidate the signature. Add --sign KEY to verify and sign it"
        click.echo(f"{verification.unproven.description} is not verified: {reason}")
    elif verification.unproven:
        _verify_unproven(artifact, verification, verification.unproven, **settings)
    return is_new


def _verify_unproven(artifact: Path, proven: Verification, unproven: Arithmetic, **settings: Any) -> None:
    """Verifies the faster arithmetic of this machine, and records it if it passes."""
    faster = _verified(f"verify {unproven.description}", artifact, unproven=True, **settings)
    if not faster.ok:
        click.echo(f"not within {faster.parity.rule}: not used, {proven.runtime.split(';')[0]} is used instead")
        return
    try:
        record_verified(artifact, faster)
        click.echo("ok, recorded in manifest.json: used here from now on")
    except OutputError as error:  # the artifact stays valid without it, so this is no failure
        click.echo(f"ok, but not recorded, so not used: {error}")


def _verified(step: str, artifact: Path, **settings: Any) -> Verification:
    """Verifies an artifact and prints the result."""
    with console.step(step):
        verification = verify(artifact, **settings)
    click.echo(f"{verification.runtime}: {verification.summary}")
    click.echo(f"worst pair: {verification.worst_pair}")
    return verification


main = partial(console.run, command)
