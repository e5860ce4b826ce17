"""Types of the strings in a manifest: all are printable, and paths stay inside the artifact."""

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

_MAX_NAME_BYTES = 200
_MAX_PATH_CHARACTERS = 1024


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters or line breaks")
    return text


def checked_file_name(text: str) -> str:
    """Raises `ValueError` unless `text` is one part of a path and can't be taken for an option or a hidden file."""
    if not text or text.startswith((".", "-")) or "/" in text or "\\" in text or len(text.encode()) > _MAX_NAME_BYTES:
        raise ValueError(
            f"'{text[:40]}' can't name a file: it is empty, begins with '.' or '-', holds '/' or '\\', or has more "
            f"than {_MAX_NAME_BYTES} bytes"
        )
    return _one_line(text)


def _stays_inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or str(PurePosixPath(path)) != path:
        raise ValueError(f"path '{path[:200]}' is not a plain path inside the artifact")
    if len(path) > _MAX_PATH_CHARACTERS or max(len(part.encode()) for part in parts) > _MAX_NAME_BYTES:
        raise ValueError(f"path '{path[:40]} …' is too long")
    return _one_line(path)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PathInside = Annotated[str, AfterValidator(_stays_inside)]
FileName = Annotated[str, AfterValidator(checked_file_name)]
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Line = Annotated[str, Field(max_length=4096), AfterValidator(_one_line)]
