"""A folder that is read through descriptors: no link is followed, and nothing but plain files is opened.

Windows has no descriptors of folders. There, names are looked up by path, so a folder that somebody replaces while it
is read is not noticed; links are still refused.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, Self

Kind = Literal["file", "folder", "link", "other"]

_HAS_DESCRIPTORS = os.open in os.supports_dir_fd
_COMMON_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))  # each of some systems
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _COMMON_FLAGS
# O_NONBLOCK: a FIFO that replaces a file between the check and the opening does not block.
_FILE_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _COMMON_FLAGS
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _COMMON_FLAGS
_Place = int | str  # of an open folder: its descriptor, or its path on Windows
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
        self._top = _opened(str(resolved))
        self._closing = contextlib.ExitStack()
        self._closing.callback(_close, self._top)
        self._blobs: tuple[_Place, str] | None = None
        hub = _hub_blobs(resolved)
        self._is_snapshot = hub is not None
        if hub is not None:
            with contextlib.suppress(OSError):  # a cache without links has no blobs
                blobs = _opened(str(hub[0]))
                self._closing.callback(_close, blobs)
                self._blobs = blobs, hub[1]

    def open(self, name: str) -> BinaryIO:
        """Opens a plain file for reading; `name` is its path below the folder, with '/' between the parts."""
        *parents, last = name.split("/")
        parent = self._opened_folder(parents)
        try:
            path, place = _located(last, parent)
            if not stat.S_ISLNK(os.lstat(path, **place).st_mode):
                return _plain_file(last, parent)
            target = os.readlink(path, **place).replace(os.sep, "/")
        finally:
            _close(parent)
        if self._blobs is None:
            raise OSError(errno.ELOOP, "a link", name)
        blobs, way = self._blobs
        blob = target.removeprefix("../" * len(parents) + way)
        if target != "../" * len(parents) + way + blob or not _BLOB.fullmatch(blob):
            raise OSError(errno.ELOOP, "a link that does not lead to a blob of its own hub repository", name)
        try:
            path, place = _located(blob, blobs)
            shared = os.readlink(path, **place).replace(os.sep, "/")
        except OSError:  # no link
            return _plain_file(blob, blobs)
        if not _SHARED_BLOB.fullmatch(shared):
            raise OSError(errno.ELOOP, "a link that does not lead to a blob of its own hub cache", name)
        *parents, blob = shared.split("/")
        parent = self._opened_folder(parents, blobs)
        try:
            return _plain_file(blob, parent)
        finally:
            _close(parent)

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
            _close(descriptor)

    def replace(self, name: str, content: bytes, part: str) -> None:
        """Writes a file of this folder, whole or not at all; what was there before, link or file, is replaced.

        Nothing is written into a snapshot of the model hub's cache, whose commit stands for these very files.

        Args:
            name: the file.
            content: all that it will hold.
            part: name of the file that is written first; one of this name is removed.
        """
        if self._is_snapshot:
            raise OSError(errno.EROFS, "a snapshot in the model hub's cache stays as it is", name)
        (new, place), (old, _) = _located(part, self._top), _located(name, self._top)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, **place)
        try:
            with os.fdopen(os.open(new, _NEW_FILE_FLAGS, 0o666, **place), "wb") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())
            os.replace(new, old, src_dir_fd=place.get("dir_fd"), dst_dir_fd=place.get("dir_fd"))
            if isinstance(self._top, int):
                sync(self._top)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(new, **place)
            raise

    def close(self) -> None:
        """Closes the descriptors; closing twice is no error."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened_folder(self, parts: list[str], start: _Place | None = None) -> _Place:
        place = self._top if start is None else start
        place = os.dup(place) if isinstance(place, int) else place
        for part in parts:
            try:
                below = _opened(part, place)
            finally:
                _close(place)
            place = below
        return place


def _located(name: str, parent: _Place | None) -> tuple[str, dict[str, int]]:
    """The path of a name in an open folder, and the arguments that functions of `os` take with it."""
    if isinstance(parent, int):
        return name, {"dir_fd": parent}
    return os.path.join(parent or "", name), {}  # noqa: PTH118 (of strings)


def _opened(name: str, parent: _Place | None = None) -> _Place:
    """A folder, opened: the one at a path, or the one of this name in another."""
    path, place = _located(name, parent)
    if _HAS_DESCRIPTORS:
        return os.open(path, _FOLDER_FLAGS, **place)
    mode = os.lstat(path).st_mode
    if not stat.S_ISDIR(mode):
        raise OSError(errno.ELOOP if stat.S_ISLNK(mode) else errno.ENOTDIR, "not a folder", path)
    return path


def _close(place: _Place) -> None:
    if isinstance(place, int):
        os.close(place)


def sync(descriptor: int) -> None:
    """Waits until a file's content, or the names in a folder, are on disk, if the file system can tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _plain_file(name: str, parent: _Place) -> BinaryIO:
    path, place = _located(name, parent)
    # The kind is checked before the opening, too: opening a device can have effects.
    if not stat.S_ISREG(os.lstat(path, **place).st_mode):
        raise OSError(errno.EINVAL, "not a plain file", name)
    file = os.fdopen(os.open(path, _FILE_FLAGS, **place), "rb")
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
