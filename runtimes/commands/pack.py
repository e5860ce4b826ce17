"""`ettin-pack`: an artifact and the packages that run it in one archive, for machines without a network."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ettin.artifacts.errors import MissingDependency, OutputError, UnverifiedArtifact
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.precisions import precisions, unproven
from ettin.artifacts.publishing import NEW, workspace
from ettin.artifacts.targets import target_named
from ettin.artifacts.writing import replace
from ettin.runtimes.commands import console
from ettin.runtimes.hub import located
from ettin.runtimes.loading import check_usable
from ettin.runtimes.machine import own_source

_PROJECT = "ettin-export"
_README = """# {name}, packed

For {system} with Python {python}. The installation needs no network.

    python3 -m venv env
    env/bin/pip install --no-index --find-links wheels -r requirements.txt
    env/bin/ettin-verify artifact     # its scores on this machine, without PyTorch
    env/bin/ettin-serve artifact      # http://127.0.0.1:8080/rerank
{missing}"""
_MISSING = """
`wheels/` has only this project. First download the others, on a machine with a network and the same system and Python:
`pip download -r requirements.txt -d wheels --find-links wheels`.
"""


def requirements(extras: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """This project with `extras`, `others`, and every package that they need, pinned to the installed versions.

    One on each line, this project first.

    Raises:
        MissingDependency: one of them is not installed.
    """
    listed = ",".join(sorted(extras))
    pins: dict[str, str] = {}
    wanted, seen = [Requirement(f"{_PROJECT}[{listed}]"), *map(Requirement, others)], set()
    while wanted:
        requirement = wanted.pop()
        name, chosen = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise MissingDependency("the archive", name, listed) from None
        pins[name] = distribution.version
        for needed in map(Requirement, distribution.requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in chosen or [""]):
                wanted.append(needed)
    return [f"{_PROJECT}[{listed}]=={pins.pop(_PROJECT)}", *(f"{name}=={pins[name]}" for name in sorted(pins))]


def pack(artifact: OpenArtifact, archive: Path, *, with_wheels: bool, force: bool = False) -> None:
    """Writes the archive: artifact, requirements, wheels, and how to install them.

    Args:
        artifact: open; the files that its manifest lists are packed, as it lists them.
        archive: a `.tar.gz`.
        with_wheels: bring every package, for this system and Python; False: this project alone.
        force: replace an archive that is there.

    Raises:
        DamagedArtifact: a file of the artifact differs from the manifest.
        OutputError: the archive exists, or can't be written; or pip could not bring the wheels.
        MissingDependency: a package that the archive must name is not installed here.
    """
    if archive.exists() and not force:
        raise OutputError(f"{archive}: exists, left as it is. Replace it with --force")
    manifest = artifact.manifest
    runtime = target_named(manifest.target).runtime
    is_ours = runtime.distribution == _PROJECT
    lines = requirements({"serve", runtime.extra} if is_ours else {"serve"}, [] if is_ours else [runtime.requirement])
    readme = _README.format(
        name=f"{manifest.name}, {manifest.target} {', '.join(precisions(artifact.whole_manifest))}",
        system=sys.platform,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        missing="" if with_wheels else _MISSING,
    )
    try:
        with workspace(archive) as scratch:
            folder, part = scratch / "packed", scratch / NEW
            folder.mkdir()
            (folder / "README.md").write_text(readme, encoding="utf-8")
            (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            _collect(folder / "wheels", lines, with_wheels)
            artifact.copy_all(folder / "artifact")
            with tarfile.open(part, "w:gz", compresslevel=6) as tar:
                tar.add(folder, archive.name.removesuffix(".gz").removesuffix(".tar"), filter=_anonymous)
            replace(part, archive)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{archive}: can't be written ({reason}). Choose another: --output") from error


def _collect(wheels: Path, lines: list[str], with_others: bool) -> None:
    """Builds this project's wheel from where it was installed from, and downloads those of the other `lines`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Our kernel works with the OpenVINO that it is compiled against: the one that the archive names.
    pinned = wheels.parent.parent / "pinned.txt"
    pinned.write_text("".join(f"{line}\n" for line in lines if line.startswith("openvino==")), encoding="utf-8")
    for_build = {"PIP_CONSTRAINT": str(pinned), "PIP_BUILD_CONSTRAINT": str(pinned)}  # until pip 25.2, from pip 25.3
    _run([*command, "wheel", "--no-deps", "-w", str(wheels), own_source()], for_build)
    if with_others:
        _run([*command, "download", "--no-deps", "--only-binary=:all:", "-d", str(wheels), *lines[1:]])


def _run(command: list[str], variables: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it gave no reason"]
        raise OutputError(f"pip could not bring the wheels: {errors[-1].removeprefix('ERROR: ')}")


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leaves the packer's user, group and umask out of the archive."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


@click.command(epilog=console.example_epilog("ettin-pack ettin-reranker-demo/openvino-int8 --wheels"))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="The archive.  [default: CHECKPOINT-TARGET-PRECISION.tar.gz]"
)
@click.option(
    "--wheels", is_flag=True, help="Include all packages, for this system and Python; needs the package index."
)
@click.option("--force", is_flag=True, help="Replace an archive that is already there.")
def command(artifact: Path, output: Path | None, wheels: bool, force: bool) -> None:
    """Pack ARTIFACT, a pinned requirements file and wheels into one archive.

    On another machine, pip installs the unpacked archive without a network, and ettin-verify, ettin-rerank and
    ettin-serve run.
    """
    with OpenArtifact(located(artifact)) as opened:
        check_usable(opened)
        if names := unproven(opened.whole_manifest):
            raise UnverifiedArtifact(
                f"{artifact}: scores in {', '.join(names)} are not proven. Run here: ettin-verify {artifact}"
            )
        archive = output or Path(f"{opened.manifest.full_name}.tar.gz")
        with console.step(f"pack {archive.name}"):
            pack(opened, archive, with_wheels=wheels, force=force)
    console.note(f"  {archive.stat().st_size / 2**20:.0f} MiB")
    click.echo(archive)


main = partial(console.run, command, publishes=True)
