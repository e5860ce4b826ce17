"""Publishing: an artifact appears whole or not at all, and an old one is replaced only by a whole new one.

An artifact is made in a workspace, a hidden folder beside the output, owned by a lock that ends with its process.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ettin.artifacts.errors import OutputError
from ettin.artifacts.manifest import MANIFEST_NAME
from ettin.artifacts.writing import exchange, sync, sync_tree

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NEW = "new"  # what is being made, in a workspace
OLD = "old"  # what it displaces, where the two can't be exchanged in one step

_LOCK = "lock"
_LOCKED_BYTE = 1 << 30  # on Windows, where nobody else could read a locked part: far behind the content
_NO_LOCKS = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
# A lock proves nothing about a process on another machine: not every network file system shares locks. A workspace that
# seems to come from one is removed when nothing in it was written for a day; an artifact that it displaced comes back
# after a minute, which is far more than the time between two renames.
_ABANDONED_S = 24 * 3600
_STUCK_S = 60


def check_output(output: Path, force: bool) -> None:
    """Refuses an output where the user would lose something, before any work is done.

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

    If the block fails (an error, Ctrl-C, a full disk), the temporary folder is removed and what was at `output` stays.
    If the process is killed, the next export to the same place removes it (see `workspace`).

    The files are on disk before they take the place of an artifact. The two are exchanged in one step, so that there is
    one at any time. Where the file system can't do that, the old one is moved aside first: for a moment there is none,
    and if the process is killed in that moment, the next export restores it.

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
        output.rename(stage.with_name(OLD))  # the workspace restores it if the next step fails
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


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A folder beside `output`, on the same file system, that is removed when the block ends.

    Workspaces of processes that were killed while they made `output` are removed first, and an artifact that one had
    displaced comes back. A workspace whose lock is held is left alone. Folders above `output` are made too, and removed
    again if they stay empty.

    Raises:
        OSError: the folder above `output` can't be written.
    """
    output = output.absolute()
    made = [above for above in output.parents if not above.exists()]
    folder, lock = _owned(output)
    try:
        _clean_up(output, folder)
        yield folder
    finally:
        try:
            _dispose(folder, output)
        finally:
            _released(folder, lock)
            for above in made:
                with suppress(OSError):  # not empty
                    above.rmdir()


def _owned(output: Path) -> tuple[Path, int]:
    """A new workspace and the descriptor of its lock, held."""
    while True:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process removed the folder above, or this one while it was empty
        is_held = _hold(lock, wait=True)  # another process that cleans up may look at it for a moment
        try:
            is_there = os.path.samestat(os.fstat(lock), (folder / _LOCK).stat())
        except FileNotFoundError:
            is_there = False
        if is_there:
            if is_held:
                os.write(lock, _machine())
            return folder, lock
        os.close(lock)


def _hold(lock: int, wait: bool = False) -> bool | None:
    """Takes a lock; False if another process holds it and `wait` is not set. None: this file system has no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(lock, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(lock, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            os.lseek(lock, 0, os.SEEK_SET)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second on Windows
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _machine() -> bytes:
    """The id of the running kernel, among whose processes a lock is a proof; empty: not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""


def _clean_up(output: Path, own: Path) -> None:
    now_s = own.stat().st_mtime  # the clock of the file system, which may be that of another machine
    pattern = re.compile(re.escape(f".{output.name}.partial-") + "[a-z0-9_]{8}")  # as tempfile names folders
    for folder in sorted(output.parent.iterdir()):
        if folder != own and pattern.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with suppress(OSError):  # another user's, or just being removed
                _clean_up_one(folder, output, now_s)


def _clean_up_one(folder: Path, output: Path, now_s: float) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        folder.rmdir()  # killed before it had a lock, so it is empty; anything else stays
        return
    try:
        is_held = _hold(lock)
        if is_held is False:
            return
        owner = os.read(lock, 100)
        is_dead = bool(is_held) and owner == _machine() != b""
        if is_held and not owner:  # killed before it wrote its machine, if nothing else is there
            is_dead = [path.name for path in folder.iterdir()] == [_LOCK]
        written_s = max((path.lstat().st_mtime for path in folder.rglob("*")), default=now_s)
        idle_s = now_s - max(written_s, folder.stat().st_mtime)
        if is_dead or (is_held and idle_s > _ABANDONED_S):
            _dispose(folder, output)
        elif now_s - folder.stat().st_mtime > _STUCK_S:
            _restore(folder, output)
    finally:
        _released(folder, lock)


def _restore(folder: Path, output: Path) -> None:
    if (folder / OLD).exists() and not output.exists():
        (folder / OLD).rename(output)


def _dispose(folder: Path, output: Path) -> None:
    """Removes a workspace, its lock last: if this process is killed meanwhile, the next one recognises the rest."""
    _restore(folder, output)
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    _remove_lock(folder)


def _remove_lock(folder: Path) -> None:
    with suppress(OSError):  # what could not be removed keeps its lock
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


def _released(folder: Path, lock: int) -> None:
    os.close(lock)
    if sys.platform == "win32" and folder.is_dir():  # it removes no file that is open
        _remove_lock(folder)
