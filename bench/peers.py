"""What a user would pick instead, each in an environment of its own: how that is made, and who lives there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin.artifacts.errors import EttinError, OutputError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.bench.contest import Contestant
from ettin.runtimes.commands import console
from ettin.runtimes.machine import own_source

_MARK = "peer.json"  # what an environment was made from; written last

# llama.cpp's AMX products die (SIGILL, 0.3.36 with GCC 12 on a Xeon that has AMX); everything else of the processor
# stays in use. Compilers take these options where there is no AMX, too.
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


@dataclass(frozen=True)
class Peer:
    """A way to run these models that is not ours.

    Args:
        kind: see `contestant.KINDS`.
        source: what it runs: "checkpoint", or a target of ours.
        packages: what pip installs; "SELF[extras]" is this project, "torch" the version that is installed here.
        arguments: of the kind, after what it runs; "{entry}" is the file that the artifact's engine opens.
        variables: of pip, for packages that are compiled.
        sources: packages whose source is unpacked beside the environment.
    """

    kind: str
    source: str
    packages: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def environment(self) -> str:
        """Peers of the same packages share one."""
        return self.kind


_SENTENCE_TRANSFORMERS = ("torch", "sentence-transformers")
PEERS: dict[str, Peer] = {
    "sentence-transformers fp32": Peer("cross-encoder", "checkpoint", _SENTENCE_TRANSFORMERS, ("float32",)),
    "sentence-transformers bf16": Peer("cross-encoder", "checkpoint", _SENTENCE_TRANSFORMERS, ("bfloat16",)),
    "Optimum": Peer("optimum", "onnx", ("torch", "optimum-onnx[onnxruntime]")),
    "fastembed": Peer("fastembed", "onnx", ("fastembed",), ("{entry}",)),
    "FlashRank": Peer("flashrank", "onnx", ("FlashRank",)),
    "llama.cpp q8_0": Peer(
        "llama-cpp", "transformers", ("torch", "transformers", "sentencepiece", "llama-cpp-python==0.3.36"),
        variables=(("CMAKE_ARGS", f"-DCMAKE_C_FLAGS='{_NO_AMX}' -DCMAKE_CXX_FLAGS='{_NO_AMX}'"),),
        sources=("llama-cpp-python==0.3.36",),
    ),
    "OpenVINO, traced": Peer("traced", "checkpoint", ("torch", "SELF[export,openvino]", "nncf"), ("default",)),
    "OpenVINO, stock NNCF int8": Peer("traced", "checkpoint", ("torch", "SELF[export,openvino]", "nncf"), ("int8",)),
}  # fmt: skip


def make_environments(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Makes what is not there yet; one that can't be made leaves nothing behind.

    Args:
        root: folder of the environments.
        names: peers.

    Returns:
        By peer, why its environment could not be made.
    """
    problems = {}
    for name in names:
        peer = PEERS[name]
        folder = root / peer.environment
        if (folder / _MARK).exists():
            continue
        try:
            with console.step(f"{name}: {folder}"):
                _make(peer, folder)
        except EttinError as error:
            problems[name] = str(error)
    return problems


def _make(peer: Peer, folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        venv.create(folder, with_pip=True)
        pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", "-q"]
        # pip keeps what it compiled, whatever variables it was compiled with.
        fresh = ["--no-cache-dir"] if peer.variables else []
        for package in peer.packages:  # one after the other: torch's version is settled before others ask for it
            _run([*pip, "install", *fresh, _wanted(package)], dict(peer.variables))
        for package in peer.sources:
            _unpack_source(pip, package, folder / "src")
        lines = _run([*pip, "freeze"], {}).splitlines()
        installed = [line.partition(" @ ")[0] for line in lines]  # where a package came from is a path of this machine
        (folder / _MARK).write_text(json.dumps({"packages": peer.packages, "installed": installed}, indent=1))
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{folder}: can't be made ({error.strerror or error})") from error
        raise


def _wanted(package: str) -> str:
    if package == "torch":
        import torch

        return f"torch=={torch.__version__.split('+')[0]}"
    if not package.startswith("SELF"):
        return package
    name, _, version = own_source().partition("==")
    return f"{name}{package.removeprefix('SELF')}" + (f"=={version}" if version else "")


def _unpack_source(pip: Sequence[str], package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _run([*pip, "download", "--no-deps", "--no-binary=:all:", "-d", scratch, package], {})
        (archive,) = Path(scratch).iterdir()
        shutil.unpack_archive(archive, folder, filter="data")


def _run(command: Sequence[str], variables: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    if done.returncode:
        raise EttinError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    scripts = sysconfig.get_path("scripts", scheme="venv", vars={"base": str(folder)})
    return Path(scripts) / f"python{'.exe' if sys.platform == 'win32' else ''}"


@contextmanager
def peer_entries(
    names: Sequence[str], root: Path, checkpoint: Path | None, artifacts: Sequence[Path]
) -> Iterator[list[Contestant]]:
    """Contestants, one for each peer and thing that it runs; those that can't take part have their reason.

    Args:
        names: peers; what they were converted to is gone at the end.
        root: folder of the environments.
        checkpoint: for those that run the checkpoint.
        artifacts: for those that run one of ours.

    Raises:
        UsageError: an unknown peer.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"unknown peer '{unknown[0]}', expected some of: {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        entries = []
        for name in names:
            peer, folder = PEERS[name], root / PEERS[name].environment
            sources: list[Path | None] = [checkpoint] if peer.source == "checkpoint" and checkpoint else []
            sources += [path for path in artifacts if Manifest.read(path).target == peer.source]
            title = name
            for source in sources or [None]:
                if source and len(sources) > 1:
                    title = f"{name}, {source.name}"
                entry = Contestant(title, peer.kind, [], python=str(python_of(folder)))
                entries.append(entry)
                if source is None:
                    entry.problem = f"runs '{peer.source}', of which none was named"
                elif not (folder / _MARK).exists():
                    entry.problem = f"{folder}: no environment. Run: ettin-bench make-peers {root}"
                else:
                    _prepared(entry, peer, source, folder, Path(scratch))
        yield entries


def _prepared(entry: Contestant, peer: Peer, source: Path, environment: Path, scratch: Path) -> None:
    prepare: Callable[[Path, Path, Path], Path] = _CONVERTED.get(peer.kind, lambda source, *_: source)
    try:
        entry.arguments = [str(prepare(source, environment, scratch))]
    except EttinError as error:
        entry.problem = str(error)
    for argument in peer.arguments:
        entry.arguments.append(Manifest.read(source).entry if argument == "{entry}" else argument)


def _gguf(source: Path, environment: Path, scratch: Path) -> Path:
    """A checkpoint as llama.cpp's own script converts it."""
    target = scratch / f"{source.resolve().parent.name}-q8_0.gguf"
    (script,) = (environment / "src").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    command = [str(python_of(environment)), str(script), str(source), "--outtype", "q8_0", "--outfile", str(target)]
    _run(command, {})
    return target


_CONVERTED: dict[str, Callable[[Path, Path, Path], Path]] = {"llama-cpp": _gguf}


def installed_in(root: Path, names: Sequence[str]) -> dict[str, Any]:
    """What each peer's environment holds, as pip lists it."""
    files = {name: root / PEERS[name].environment / _MARK for name in names}
    return {name: json.loads(file.read_text())["installed"] for name, file in files.items() if file.exists()}
