"""`ettin-pack`: one archive for a machine without a network."""

from pathlib import Path
from typing import NoReturn

import click

from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes import console
from ettin.runtimes.pack import pack
from ettin.runtimes.registry import check_usable


@click.command(epilog=console.example_epilog("ettin-pack ettin-reranker-demo/openvino-int8 --wheels"))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The archive.  [default: CHECKPOINT-TARGET.tar.gz]")
@click.option("--wheels", is_flag=True, help="Bring all packages, for this system and Python; asks the package index.")
@click.option("--force", is_flag=True, help="Replace an archive that is already there.")
def command(artifact: Path, output: Path | None, wheels: bool, force: bool) -> None:
    """Pack ARTIFACT, a pinned requirements file and wheels into one archive.

    Where it is unpacked, pip installs it without a network, and ettin-verify, ettin-rerank and ettin-serve run.
    """
    with OpenArtifact(artifact) as opened:
        check_usable(opened)
        archive = output or Path(f"{opened.manifest.full_name}.tar.gz")
        with console.step(f"pack {archive.name}"):
            pack(opened, archive, with_wheels=wheels, force=force)
    console.note(f"  {archive.stat().st_size / 2**20:.0f} MiB")
    click.echo(archive)


def main() -> NoReturn:
    """Entry point."""
    console.run(command, publishes=True)
