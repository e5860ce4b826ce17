"""What a user would run instead of an artifact, and the environments of those that need one of their own."""

import json
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ettin.artifacts.errors import EttinError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.bench.contest import Contestant
from ettin.runtimes.commands import console
from ettin.runtimes.machine import own_source

_CHECKPOINT = "checkpoint"
_MARK = "packages.json"  # what an environment was made from; written last


@dataclass(frozen=True)
class Peer:
    """A way to run these models that is not ours."""

    kind: str  # one of `contestants.KINDS`
    arguments: tuple[str, ...] = ()  # of that kind after what it runs, see `_prepare`
    source: str = _CHECKPOINT  # what it runs: "checkpoint", or a target of ours
    searches: bool = False  # its best batch is searched in any case
    # What pip installs into its own environment: "SELF[extras]" is this project, "torch" the version that is installed
    # here; empty: it runs in this environment.
    packages: tuple[str, ...] = ()


_LLAMA_CPP = "llama-cpp-python==0.3.36"
# llama.cpp's AMX products die (SIGILL, 0.3.36 with GCC 12 on a Xeon that has AMX); everything else of the processor
# stays in use. Compilers take these options where there is no AMX, too.
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_PIP_VARIABLES = {"CMAKE_ARGS": f"-DCMAKE_C_FLAGS='{_NO_AMX}' -DCMAKE_CXX_FLAGS='{_NO_AMX}'"}

PEERS: dict[str, Peer] = {
    "st-fp32": Peer("cross-encoder", ("float32", "{device}")),
    "st-fp32-tuned": Peer("cross-encoder", ("float32", "{device}"), searches=True),
    "st-bf16": Peer("cross-encoder", ("bfloat16", "{device}")),
    "traced": Peer("traced", ("default",)),
    "traced-f32": Peer("traced", ("f32",)),
    "traced-int8": Peer("traced", ("int8",), packages=("torch", "SELF[export,openvino]", "nncf")),
    "optimum": Peer("optimum", source="onnx", packages=("torch", "optimum-onnx[onnxruntime]")),
    "fastembed": Peer("fastembed", ("{entry}",), source="onnx", packages=("fastembed",)),
    "llama.cpp": Peer(
        "llama-cpp", source="transformers", packages=("torch", "transformers", "sentencepiece", _LLAMA_CPP)
    ),
}


@contextmanager
def peer_entries(
    names: Sequence[str], checkpoint: Path | None, artifacts: Sequence[Path], environments: Path | None, device: str
) -> Iterator[list[Contestant]]:
    """Contestants, one for each peer and thing that it runs; one that can't take part has its reason.

    What they were converted to goes away with the block. A missing environment is made, which takes minutes.
    """
    for name in names:
        _check(name, checkpoint, environments)
    with tempfile.TemporaryDirectory() as scratch:
        entries = []
        for name in names:
            peer = PEERS[name]
            ours = [path for path in artifacts if Manifest.read(path).target == peer.source]
            sources = [checkpoint] if checkpoint and peer.source == _CHECKPOINT else ours
            for source in sources:
                entry = Contestant(name, peer.kind, [], searches=peer.searches)
                entry.name += f", {source.name}" if len(sources) > 1 else ""
                try:
                    _prepare(entry, name, source, environments, device, Path(scratch))
                except EttinError as error:
                    entry.problem = str(error)
                entries.append(entry)
            if not sources:
                reason = f"runs '{peer.source}', of which there is none among the artifacts"
                entries.append(Contestant(name, peer.kind, [], problem=reason))
        yield entries


def _check(name: str, checkpoint: Path | None, environments: Path | None) -> None:
    peer = PEERS[name]
    if peer.source == _CHECKPOINT and checkpoint is None:
        raise UsageError(f"peer '{name}' runs the checkpoint: name it with --checkpoint")
    if peer.packages and environments is None:
        raise UsageError(f"peer '{name}' needs an environment of its own: name a folder for it with --environments DIR")


def _prepare(entry: Contestant, name: str, source: Path, environments: Path | None, device: str, scratch: Path) -> None:
    """Makes a peer's environment and what it runs, and fills in the entry.

    Of its arguments, "{device}" is the device and "{entry}" the file that an artifact's engine opens.
    """
    peer, path = PEERS[name], source
    if peer.packages and environments:
        folder = environments / name
        if not (folder / _MARK).exists():
            with console.step(f"make {folder}"):
                make_environment(peer.packages, folder)
        entry.python = str(python_of(folder))
        if peer.kind == "llama-cpp":
            path = scratch / f"{source.resolve().parent.name}-q8_0.gguf"
            (script,) = (folder / "src").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
            _run([entry.python, str(script), str(source), "--outtype", "q8_0", "--outfile", str(path)])
    values = {"{device}": device} | ({} if peer.source == _CHECKPOINT else {"{entry}": Manifest.read(source).entry})
    entry.arguments = [str(path), *(values.get(word, word) for word in peer.arguments)]


def make_environment(packages: Sequence[str], folder: Path) -> None:
    """Makes an environment with these packages; llama.cpp's source, which converts models, lies in it.

    Raises:
        EttinError: pip failed, with the last line that it wrote; the folder is made again the next time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", "-q"]
    if _LLAMA_CPP in packages:
        pip.append("--no-cache-dir")  # it keeps what it compiled, whatever variables it was compiled with
        _run([*pip, "download", "--no-deps", "--no-binary=:all:", "-d", str(folder), _LLAMA_CPP])
        (archive,) = folder.glob("llama_cpp_python*")
        shutil.unpack_archive(archive, folder / "src", filter="data")
    if packages:
        _run([*pip, "install", *map(_requirement, packages)])
    (folder / _MARK).write_text(json.dumps(packages))


def _requirement(package: str) -> str:
    if package == "torch":
        import torch

        return f"torch=={torch.__version__.split('+')[0]}"
    if not package.startswith("SELF"):
        return package
    name, _, version = own_source().partition("==")
    return f"{name}{package.removeprefix('SELF')}" + (f"=={version}" if version else "")


def _run(command: Sequence[str]) -> None:
    variables = {**os.environ, **_PIP_VARIABLES}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        raise EttinError((done.stderr.strip().splitlines() or ["no message"])[-1])


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"
