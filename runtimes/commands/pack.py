"""`ettin-pack`: an artifact and what runs it in one archive, for machines without a network."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NoReturn, cast

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ettin.artifacts.errors import MissingDependency, OutputError
from ettin.artifacts.manifest import MANIFEST_NAME
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.publishing import NEW, workspace
from ettin.artifacts.signatures import SIGNATURE_NAME
from ettin.artifacts.targets import target_named
from ettin.artifacts.writing import replace
from ettin.runtimes.commands import console
from ettin.runtimes.loading import check_usable

_PROJECT = "ettin-export"
_README = """# {name}, packed

For {system} with Python {python}; nothing is fetched but what `wheels/` lacks.

    python3 -m venv env
    env/bin/pip install --no-index --find-links wheels -r requirements.txt
    env/bin/ettin-verify artifact     # its scores on this machine, without PyTorch
    env/bin/ettin-serve artifact      # http://127.0.0.1:8080/rerank
{missing}"""
_MISSING = """
`wheels/` holds this project alone. Bring the others: on a machine with a network and the same system and Python, run
`pip download -r requirements.txt -d wheels --find-links wheels`.
"""


def requirements(extras: Iterable[str]) -> list[str]:
    """This project and everything that it needs for `extras`, pinned to what is installed here, a line each.

    Raises:
        MissingDependency: something of that is not installed.
    """
    pinned: dict[str, str] = {}
    wanted = [(_PROJECT, frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        name, chosen = wanted.pop()
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise MissingDependency("the archive", name, ",".join(sorted(extras))) from None
        pinned[name] = distribution.version
        for line in distribution.requires or ():
            needed = Requirement(line)
            environments = [{"extra": extra} for extra in chosen] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(each) for each in environments):
                wanted.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    project = f"{_PROJECT}[{','.join(sorted(extras))}]=={pinned.pop(_PROJECT)}"
    return [project, *(f"{name}=={version}" for name, version in sorted(pinned.items()))]


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
        MissingDependency: something that the archive must name is not installed here.
    """
    if archive.exists() and not force:
        raise OutputError(f"{archive}: exists, left as it is. Replace it with --force")
    manifest = artifact.manifest
    lines = requirements({target_named(manifest.target).runtime.extra, "serve"})
    name = archive.name.removesuffix(".gz").removesuffix(".tar")
    readme = _README.format(
        name=f"{manifest.name}, {manifest.target} {manifest.precision}",
        system=sys.platform,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        missing="" if with_wheels else _MISSING,
    )
    try:
        with workspace(archive) as scratch:
            wheels, part = scratch / "wheels", scratch / NEW
            _collect(wheels, lines, with_wheels)
            with tarfile.open(part, "w:gz", compresslevel=6) as tar:
                _add_bytes(tar, f"{name}/README.md", readme.encode())
                _add_bytes(tar, f"{name}/requirements.txt", "".join(f"{line}\n" for line in lines).encode())
                _add_artifact(tar, artifact, f"{name}/artifact")
                tar.add(wheels, f"{name}/wheels", filter=_anonymous)
            replace(part, archive)
    except OSError as error:
        raise OutputError(
            f"{archive}: can't be written ({error.strerror or error}). Choose another: --output"
        ) from error


def _collect(wheels: Path, lines: list[str], with_others: bool) -> None:
    """This project's wheel, from where it was installed from, and those of the other `lines`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Our kernel works with the OpenVINO that it is compiled against: the one that the archive names.
    pinned = wheels.parent / "pinned.txt"
    pinned.write_text("".join(f"{line}\n" for line in lines if line.startswith("openvino==")), encoding="utf-8")
    for_build = {"PIP_CONSTRAINT": str(pinned), "PIP_BUILD_CONSTRAINT": str(pinned)}  # until pip 25.2, from pip 25.3
    _run([*command, "wheel", "--no-deps", "-w", str(wheels), own_source()], for_build)
    if with_others:
        others = wheels.parent / "others.txt"
        others.write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
        _run([*command, "download", "--no-deps", "--only-binary=:all:", "-d", str(wheels), "-r", str(others)])


def own_source() -> str:
    """A folder, for a project that was installed from one (PEP 610); else its name and version on the index."""
    # All of that name: a checkout that is the current folder has a record of its own, without the origin.
    for distribution in importlib.metadata.distributions(name=_PROJECT):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        url = urllib.parse.urlsplit(origin.get("url", ""))
        if url.scheme == "file":
            return urllib.parse.unquote(url.path)
    return f"{_PROJECT}=={importlib.metadata.version(_PROJECT)}"


def _run(command: list[str], variables: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it gave no reason"]
        raise OutputError(f"pip could not bring the wheels: {errors[-1].removeprefix('ERROR: ')}")


def _add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(_new_entry(name, len(content)), io.BytesIO(content))


def _add_artifact(tar: tarfile.TarFile, artifact: OpenArtifact, name: str) -> None:
    for listed in artifact.manifest.files:
        with artifact.stream(listed.path) as file:
            tar.addfile(_new_entry(f"{name}/{listed.path}", listed.size_bytes), cast(IO[bytes], file))
    _add_bytes(tar, f"{name}/{MANIFEST_NAME}", artifact.manifest_bytes)
    if artifact.signature is not None:
        _add_bytes(tar, f"{name}/{SIGNATURE_NAME}", artifact.signature)


def _new_entry(name: str, size_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size_bytes, 0o644
    return entry


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Whose files they were is nobody's business."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


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
