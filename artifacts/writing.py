"""Writing files and folders so that readers, and a power cut, find the old content or the new, never a part of it."""

import ctypes
import errno
import os
import secrets
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What a kernel, a file system such as NFS, or a container's filter of system calls answers to an exchange.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: whoever reads `path` gets the old content or all of the new.

    Args:
        path: the file. A device or a pipe is written as it is.
        content: all that it will hold.

    Raises:
        OSError: it can't be written; what was at `path` is unchanged.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        part.write_bytes(content)
        replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace(part: Path, path: Path) -> None:
    """Gives a finished file its place: `path` is the old file or, when this returns, on disk the new one.

    Args:
        part: the file, on the file system of `path`.
        path: its place.
    """
    sync(part)
    part.replace(path)
    sync(path.absolute().parent)


def sync_tree(folder: Path) -> None:
    """Returns when all files and folders below `folder`, and `folder` itself, are on disk."""
    for above, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(above) / name)
        sync(Path(above))


def sync(path: Path) -> None:
    """Returns when a file's content, or the names in a folder, are on disk, where the file system can tell."""
    if os.name == "nt":  # Windows opens no folder, and synchronises no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two files or folders of one file system in one step: both names exist at any time.

    Returns:
        False where the system or the file system can't (it is not Linux, or NFS): nothing was changed.

    Raises:
        OSError: one of the two does not exist, or can't be moved.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
