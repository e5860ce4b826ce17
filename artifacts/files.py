"""The files of an artifact: listing them when it is written, comparing them when they are read."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from ettin.artifacts.errors import DamagedArtifact, OutputError
from ettin.artifacts.folder import Folder
from ettin.artifacts.manifest import CARD_NAME, MANIFEST_NAME, FileEntry

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
_MOST_BYTES_A_READ = 1 << 30


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder` but the manifest and the card, in order of their paths.

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
                elif name not in (MANIFEST_NAME, CARD_NAME):
                    names.append(name)
        entries = []
        for name in sorted(names, key=lambda name: name.split("/")):
            with opened.open(name) as file:
                entries.append(file_entry(name, file))
        return tuple(entries)


def file_entry(name: str, file: BinaryIO) -> FileEntry:
    """The manifest's entry for an open file."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return FileEntry(path=name, size_bytes=file.tell(), sha256=digest)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckedFile:
    """A file that is hashed while it is read; all methods raise `DamagedArtifact`.

    Args:
        file: the open file.
        entry: its entry in the manifest.
        checksums: compare the contents, too.
        damaged: makes an error of a reason.
    """

    def __init__(
        self, file: BinaryIO, entry: FileEntry, checksums: bool, damaged: Callable[[str], DamagedArtifact]
    ) -> None:
        self._file, self._entry, self._damaged = file, entry, damaged
        self._hash = hashlib.sha256() if checksums else None
        self._left_bytes = entry.size_bytes

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all for a negative `size`; b"" at the end."""
        expected_bytes = self._left_bytes if size < 0 else min(size, self._left_bytes)
        content = self._explained(self._file.read, expected_bytes)
        self._count(content)
        if len(content) < expected_bytes:
            raise self._too_short()
        return content

    def readinto(self, buffer: memoryview) -> None:
        """Fills `buffer`, which is as long as the file."""
        filled = 0
        while filled < len(buffer):
            part = buffer[filled : filled + _MOST_BYTES_A_READ]
            count = self._explained(self._file.readinto, part)  # type: ignore[attr-defined]
            if not count:
                raise self._too_short()
            self._count(part[:count])
            filled += count

    def finish(self) -> None:
        """Compares what was read with the manifest."""
        if self._left_bytes:
            raise self._too_short()
        if self._hash is not None and self._hash.hexdigest() != self._entry.sha256:
            raise self._damaged(f"sha256 differs from {MANIFEST_NAME} (file damaged or edited)")

    def _explained(self, read: Callable[[_Argument], _Result], argument: _Argument) -> _Result:
        try:
            return read(argument)
        except OSError as error:
            raise self._damaged(f"can't be read ({error.strerror})") from None

    def _count(self, content: bytes | memoryview) -> None:
        self._left_bytes -= len(content)
        if self._hash is not None:
            self._hash.update(content)

    def _too_short(self) -> DamagedArtifact:
        return self._damaged(f"ends before the size in {MANIFEST_NAME}")
