"""The files of an artifact: listing them when it is written, comparing them when they are read."""

import hashlib
from pathlib import Path
from typing import BinaryIO

from ettin.artifacts.errors import DamagedArtifact, OutputError
from ettin.artifacts.folder import Folder
from ettin.artifacts.manifest import MANIFEST_NAME, FileEntry


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder` but the manifest, in order of their paths.

    Raises:
        OutputError: something there is neither file nor folder, such as a link that could lead outside.
    """
    names, pending = [], [""]
    with Folder(folder) as opened:
        while pending:
            for name, kind in opened.entries(pending.pop()):
                if kind == "folder":
                    pending.append(name)
                elif kind != "file":
                    raise OutputError(f"{folder / name}: an artifact holds plain files only")
                elif name != MANIFEST_NAME:
                    names.append(name)
        return tuple(_entry(opened, name) for name in sorted(names, key=lambda name: name.split("/")))


def _entry(opened: Folder, name: str) -> FileEntry:
    with opened.open(name) as file:
        return file_entry(name, file)


class CheckedFile:
    """A file that is hashed while it is read.

    Args:
        file: it.
        entry: what the manifest says of it.
        checksums: compare the contents, too.
        path: it, in words.
        again: how to get a whole one, in words.
    """

    def __init__(self, file: BinaryIO, entry: FileEntry, checksums: bool, path: str, again: str) -> None:
        self._file, self._entry, self._path, self._again = file, entry, path, again
        self._hash = hashlib.sha256() if checksums else None
        self._left_bytes = entry.size_bytes

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all for a negative `size`; b"" at the end.

        Raises:
            DamagedArtifact: the file ends before its size.
        """
        wanted = self._left_bytes if size < 0 else min(size, self._left_bytes)
        try:
            content = self._file.read(wanted)
        except OSError as error:
            raise self._damaged(f"can't be read ({error.strerror})") from None
        self._seen(content, len(content))
        if len(content) < wanted:
            raise self._damaged(f"ends before the size in {MANIFEST_NAME}")
        return content

    def readinto(self, buffer: memoryview) -> None:
        """Fills `buffer`, as long as the file.

        Raises:
            DamagedArtifact: the file ends before its size.
        """
        filled = 0
        while filled < len(buffer):
            try:
                count = self._file.readinto(buffer[filled : filled + (1 << 30)])  # type: ignore[attr-defined]
            except OSError as error:
                raise self._damaged(f"can't be read ({error.strerror})") from None
            if not count:
                raise self._damaged(f"ends before the size in {MANIFEST_NAME}")
            self._seen(buffer[filled : filled + count], count)
            filled += count

    def finish(self) -> None:
        """Compares what was read.

        Raises:
            DamagedArtifact: it is not what the manifest lists.
        """
        if self._left_bytes:
            raise self._damaged(f"ends before the size in {MANIFEST_NAME}")
        if self._hash is not None and self._hash.hexdigest() != self._entry.sha256:
            raise self._damaged(f"sha256 differs from {MANIFEST_NAME} (file damaged or edited)")

    def _seen(self, content: "bytes | memoryview", size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        if self._hash is not None:
            self._hash.update(content)

    def _damaged(self, why: str) -> DamagedArtifact:
        return DamagedArtifact(f"{self._path}: {why}. {self._again}")


def file_entry(name: str, file: BinaryIO) -> FileEntry:
    """What a manifest says of an open file."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return FileEntry(path=name, size_bytes=file.tell(), sha256=digest)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
