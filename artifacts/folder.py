"""A folder that is read through descriptors: no link is followed, and nothing but plain files is opened."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, Self

Kind = Literal["file", "folder", "link", "other"]

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO that replaces a file between the check and the opening does not block.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARED_BLOB = re.compile(r"\.\./\.\./blobs/[0-9a-f]{2}/[0-9a-f]{64}")
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class Folder:
    """An open folder. Every name is looked up below it, even if its path names another folder by then.

    The path that the user gives is resolved once, so it may lead through links. Below it links are refused, with one
    exception: in a snapshot of the model hub's cache (`models--ORG--NAME/snapshots/REVISION`, or a folder in it) a file
    may be a link to `models--ORG--NAME/blobs/HASH`, written relative, as the hub's client writes it. That may be a link
    to `blobs/HH/HASH` of the whole cache, where newer clients keep what several repositories share.

    All methods raise `OSError`.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        try:
            resolved = Path(os.path.realpath(path))
        except ValueError as error:  # a NUL in the path
            raise OSError(errno.EINVAL, str(error), str(path)) from None
        self._top = os.open(resolved, _FOLDER_FLAGS)
        self._closing = contextlib.ExitStack()
        self._closing.callback(os.close, self._top)
        self._blobs: tuple[int, str] | None = None
        hub = _hub_blobs(resolved)
        if hub is not None:
            with contextlib.suppress(OSError):  # a cache without links has no blobs
                blobs = os.open(hub[0], _FOLDER_FLAGS)
                self._closing.callback(os.close, blobs)
                self._blobs = blobs, hub[1]

    def open(self, name: str) -> BinaryIO:
        """Opens a plain file for reading; `name` is its path below the folder, with '/' between the parts."""
        *parents, last = name.split("/")
        parent = self._opened_folder(parents)
        try:
            if not stat.S_ISLNK(os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode):
                return _plain_file(last, parent)
            target = os.readlink(last, dir_fd=parent)
        finally:
            os.close(parent)
        if self._blobs is None:
            raise OSError(errno.ELOOP, "a link", name)
        blobs, way = self._blobs
        blob = target.removeprefix("../" * len(parents) + way)
        if target != "../" * len(parents) + way + blob or not _BLOB.fullmatch(blob):
            raise OSError(errno.ELOOP, "a link that does not lead to a blob of its own hub repository", name)
        try:
            shared = os.readlink(blob, dir_fd=blobs)
        except OSError:  # no link
            return _plain_file(blob, blobs)
        if not _SHARED_BLOB.fullmatch(shared):
            raise OSError(errno.ELOOP, "a link that does not lead to a blob of its own hub cache", name)
        *parents, blob = shared.split("/")
        parent = self._opened_folder(parents, blobs)
        try:
            return _plain_file(blob, parent)
        finally:
            os.close(parent)

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Content of a plain file that may not be larger than `limit_bytes`."""
        with self.open(name) as file:
            content = file.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise OSError(errno.EFBIG, f"more than {limit_bytes} bytes", name)
        return content

    def entries(self, name: str = "") -> Iterator[tuple[str, Kind]]:
        """Paths and kinds of the entries of the folder `name` below this one ("": of this one), in no order."""
        descriptor = self._opened_folder(name.split("/") if name else [])
        try:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    yield (f"{name}/{entry.name}" if name else entry.name), _kind(entry)
        finally:
            os.close(descriptor)

    def replace(self, name: str, content: bytes, part: str) -> None:
        """Writes a file of this folder, whole or not at all; what was there before, link or file, is replaced.

        Args:
            name: the file.
            content: all that it will hold.
            part: name of the file that is written first; one of this name is removed.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=self._top)
        try:
            with os.fdopen(os.open(part, _NEW_FILE_FLAGS, 0o666, dir_fd=self._top), "wb") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())
            os.replace(part, name, src_dir_fd=self._top, dst_dir_fd=self._top)
            sync(self._top)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part, dir_fd=self._top)
            raise

    def close(self) -> None:
        """Closes the descriptors; closing twice is no error."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened_folder(self, parts: list[str], start: int | None = None) -> int:
        descriptor = os.dup(self._top if start is None else start)
        for part in parts:
            try:
                below = os.open(part, _FOLDER_FLAGS, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor


def sync(descriptor: int) -> None:
    """Waits until a file's content, or the names in a folder, are on disk, if the file system can tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _plain_file(name: str, parent: int) -> BinaryIO:
    # The kind is checked before the opening, too: opening a device can have effects.
    if not stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise OSError(errno.EINVAL, "not a plain file", name)
    file = os.fdopen(os.open(name, _FILE_FLAGS, dir_fd=parent), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a plain file", name)
    return file


def _kind(entry: "os.DirEntry[str]") -> Kind:
    if entry.is_symlink():
        return "link"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


def _hub_blobs(resolved: Path) -> tuple[Path, str] | None:
    """Where the hub keeps a snapshot's files, and the way there from the top of `resolved`; None: not in a snapshot."""
    parts = resolved.parts
    for revision in range(len(parts) - 1, 1, -1):
        if parts[revision - 1] == "snapshots" and parts[revision - 2].startswith("models--"):
            return Path(*parts[: revision - 1], "blobs"), "../" * (len(parts) - revision + 1) + "blobs/"
    return None
