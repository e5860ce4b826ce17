"""Windows and macOS, as far as Linux can stand in: what they lack is taken away in a process of its own.

It shows that nothing needs these names at import, or to load, score, publish and replace an artifact. It does not show
that the file systems and processes of Windows and macOS behave as expected: nothing was run there.
"""

import subprocess
import sys
from pathlib import Path

import pytest

MACOS = """
import asyncio, concurrent.futures, ctypes, multiprocessing, os, pathlib, shutil, signal, sys, tempfile, types
import click, fastapi, numpy, onnxruntime, prometheus_client, pydantic, pyarrow.parquet, tokenizers, tqdm, uvicorn
for name in ("sched_getaffinity", "sched_setaffinity", "posix_fallocate"):
    delattr(os, name)
read_text, read_bytes = pathlib.Path.read_text, pathlib.Path.read_bytes
def without_proc(read):
    def reads(path, *arguments, **named):
        if path.parts[1:2] in (("proc",), ("sys",)):
            raise FileNotFoundError(path)
        return read(path, *arguments, **named)
    return reads
pathlib.Path.read_text, pathlib.Path.read_bytes = without_proc(read_text), without_proc(read_bytes)
sys.platform = "darwin"
"""

WINDOWS = (
    MACOS
    + """
sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None, termios=None)
for name in ("fork", "register_at_fork", "geteuid", "getuid", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGCHLD", "alarm"):
    delattr(signal, name)
for name in ("RTLD_NOW", "RTLD_LAZY"):
    delattr(os, name)
shutil._use_fd_functions = False
descriptors = set()
def by_path(function, is_open=False):
    def call(path, *arguments, dir_fd=None, src_dir_fd=None, dst_dir_fd=None, **named):
        assert dir_fd is None and src_dir_fd is None and dst_dir_fd is None, "no descriptors of folders"
        if is_open and os.path.isdir(path):
            raise PermissionError(13, "a folder", path)
        is_moved = function in (unlink, os_replace, rename)
        if is_moved and any(os.path.samestat(os.fstat(number), lstat(path)) for number in descriptors):
            raise PermissionError(13, "a file that is open", path)
        result = function(path, *arguments, **named)
        if is_open:
            descriptors.add(result)
        return result
    return call
unlink, os_replace, rename, lstat, os_open, os_close, fdopen = (
    os.unlink, os.replace, os.rename, os.lstat, os.open, os.close, os.fdopen)
def closes(descriptor):
    descriptors.discard(descriptor)
    os_close(descriptor)
def fdopens(descriptor, *arguments, **named):
    descriptors.discard(descriptor)  # its file closes it
    return fdopen(descriptor, *arguments, **named)
def scandir_by_path(path=".", scandir=os.scandir):
    assert not isinstance(path, int), "no descriptors of folders"
    return scandir(path)
os.scandir, os.close, os.fdopen = scandir_by_path, closes, fdopens
os.open, os.lstat, os.readlink = by_path(os.open, True), by_path(os.lstat), by_path(os.readlink)
os.unlink, os.replace, os.rename = by_path(unlink), by_path(os_replace), by_path(rename)
os.supports_dir_fd = set()
CDLL = ctypes.CDLL
def named_library(name, *arguments, **named):
    assert name is not None, "no library without a name"
    return CDLL(name, *arguments, **named)
ctypes.CDLL = named_library
import fcntl_of_linux
def locking(descriptor, mode, count):
    assert mode in (1, 2) and count == 1
    try:
        fcntl_of_linux.lockf(descriptor, fcntl_of_linux.LOCK_EX | fcntl_of_linux.LOCK_NB, count, 0, 1)
    except OSError as error:
        raise PermissionError(13, "locked") from error
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_LOCK=1, LK_NBLCK=2)
sys.platform = "win32"
"""
).replace("import asyncio", "import fcntl, sys\nsys.modules['fcntl_of_linux'] = fcntl\nimport asyncio", 1)

# Modules of engines and frameworks, each of which imports its own, are not for every system anyway.
PROGRAM = """
import importlib
for name in sys.argv[3:]:
    importlib.import_module(name)
from ettin.runtimes import load
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.publishing import staged
from ettin.runtimes.machine import available_cpus
artifact, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
assert available_cpus(pathlib.Path("/nothing")) >= 1
with load(artifact, threads=1) as runtime:
    scores = runtime.predict([("red planet", "Mars is the red planet."), ("red planet", "Venus")])
assert scores[0] > scores[1], scores
for _ in range(2):  # a new one, then in place of the first
    with staged(output, force=True) as folder, OpenArtifact(artifact) as opened:
        opened.copy_all(folder)
try:
    with staged(output, force=True) as folder:
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
with load(output) as runtime:
    assert (runtime.predict([("red planet", "Mars is the red planet.")]) == scores[:1]).all()
left = sorted(path.name for path in output.parent.iterdir())
assert left == [output.name], left
(output / "link").symlink_to("/etc/hostname")
try:
    load(output)
except Exception as error:
    assert "a link that is not listed" in str(error), error
else:
    raise AssertionError("a link was not refused")
print("done")
"""

_OWN_PACKAGES = ("on_", "openvino_kernels", "openvino_fusion", "openvino_tokens", "adapters", "triton", "torch")


def modules() -> list[str]:
    root = Path(__file__).parents[2]
    paths = [path for layer in ("artifacts", "runtimes") for path in sorted((root / layer).rglob("*.py"))]
    names = [".".join(("ettin", *path.relative_to(root).with_suffix("").parts)) for path in paths]
    return [
        name.removesuffix(".__init__")
        for name in names
        if "on_onnxruntime" in name or not any(part in name for part in _OWN_PACKAGES)
    ]


@pytest.mark.parametrize("system", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_without_what_linux_has(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, system: str) -> None:
    names = modules()
    assert len(names) > 40
    done = subprocess.run(
        [sys.executable, "-c", system + PROGRAM, demo_artifacts["onnx", "int8"], tmp_path / "copy", *names],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
