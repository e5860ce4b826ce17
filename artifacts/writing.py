"""Writing files and folders so that readers, and a power cut, find the old content or the new, never a part of it."""

import ctypes
import errno
import os
import secrets
import sys
from pathlib import Path

from ettin.artifacts import folder as folders
from ettin.artifacts.folder import Folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What a kernel, a file system such as NFS, or a container's filter of system calls answers to an exchange.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: a reader of `path` gets the old content or all of the new.

    Args:
        path: the file. A device or a pipe is written as it is.
        content: all that it will hold.

    Raises:
        OSError: it can't be written; what was at `path` is unchanged.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with Folder(path.parent) as folder:
        folder.replace(path.name, content, part=f".{path.name}.partial-{secrets.token_hex(4)}")


def replace(part: Path, path: Path) -> None:
    """Moves a finished file to `path`, on the same file system; it is on disk when this returns."""
    sync(part)
    part.replace(path)
    sync(path.absolute().parent)


def sync_tree(folder: Path) -> None:
    """Waits until all files and folders below `folder`, and `folder` itself, are on disk."""
    for above, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(above) / name)
        sync(Path(above))


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk, if the file system can tell."""
    if sys.platform == "win32":  # it flushes files that are open for writing, and no folders
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR)
    else:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        folders.sync(descriptor)
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
