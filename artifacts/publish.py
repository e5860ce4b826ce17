"""Publishing: an artifact appears whole or not at all, and an old one is replaced only by a whole new one."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ettin.artifacts.errors import OutputError
from ettin.artifacts.manifest import MANIFEST_NAME

_MARK = ".partial-"


def check_output(output: Path, force: bool) -> None:
    """Refuses an output that would cost the user something, before any work is done.

    Raises:
        OutputError: it exists and `force` is not given, it is no artifact, or it can't be written.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output}: exists and is not a folder. Choose another: --output DIR")
    if output.exists() and any(output.iterdir()):
        if not (output / MANIFEST_NAME).is_file():
            raise OutputError(
                f"{output}: a folder with other things in it, left as it is. Choose another: --output DIR"
            )
        if not force:
            raise OutputError(f"{output}: an artifact is already there, left as it is. Replace it with --force")
    above = output.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: can't write in {above}. Choose another: --output DIR")


@contextmanager
def staged(output: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an error.

    Whatever ends the block early (an error, Ctrl-C, a full disk), the temporary folder is removed and what was
    at `output` stays. A process killed outright leaves its temporary folder, which the next export to the same
    place removes.

    Raises:
        OutputError: see `check_output`; also a disk that is full or read-only.
    """
    check_output(output, force)
    with _explained(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        mark = f".{output.name}{_MARK}{os.getpid()}-"
        stage = Path(tempfile.mkdtemp(prefix=mark, dir=output.absolute().parent))
    try:
        with _explained(output):
            yield stage
            stage.chmod(0o755)
            _replace(output, stage, force)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(output: Path, stage: Path, force: bool) -> None:
    check_output(output, force)  # another export may have finished meanwhile
    if not output.exists():
        stage.rename(output)
        return
    old = stage.with_name(stage.name + "-old")
    output.rename(old)
    try:
        stage.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(output: Path) -> None:
    """Removes what killed exports to this place left. One that was killed while it swapped gives the old back."""
    for left in sorted(output.absolute().parent.glob(f".{output.name}{_MARK}*")):
        pid = left.name.split(_MARK)[1].split("-")[0]
        if pid.isdigit() and _is_running(int(pid)):
            continue
        if left.name.endswith("-old") and not output.exists():
            left.rename(output)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{output}: the disk is full. Nothing was published; free some space or use --output"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{output}: can't be written ({error.strerror}). Choose another: --output DIR") from error
        raise
