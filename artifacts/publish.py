"""Publishing: an artifact appears whole or not at all, and an old one is replaced only by a whole new one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ettin.artifacts.errors import OutputError
from ettin.artifacts.manifest import MANIFEST_NAME
from ettin.artifacts.staging import NEW, OLD, workspace
from ettin.artifacts.writing import exchange, sync, sync_tree


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
    at `output` stays. What a killed process leaves, the next export to the same place removes (see `workspace`).

    An artifact that is replaced is exchanged with the new one in one step, so that there is one at any time. Where the
    file system can't do that, it is moved aside first: for a moment there is none, and if the process is killed in it,
    the next export gives it back. The files are on disk before they get their place.

    Raises:
        OutputError: see `check_output`; also a disk that is full or read-only, or an output that can't be replaced.
    """
    check_output(output, force)
    with _explained(output), workspace(output) as folder:
        check_output(output, force)  # a killed export's artifact may have come back
        stage = folder / NEW
        stage.mkdir()
        yield stage
        sync_tree(stage)
        check_output(output, force)  # another export may have finished meanwhile
        try:
            _replace(output, stage)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise OutputError(
                f"{output}: can't be replaced ({error.strerror}). Nothing was published; choose another: --output DIR"
            ) from error


def _replace(output: Path, stage: Path) -> None:
    if not output.exists():
        stage.rename(output)
    elif not exchange(stage, output):
        output.rename(stage.with_name(OLD))  # the workspace gives it back if the next step fails
        stage.rename(output)
    sync(output.absolute().parent)


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
