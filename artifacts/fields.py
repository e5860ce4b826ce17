"""What the strings of a manifest may hold: all of them can be printed, and those that name files name nothing else."""

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from ettin.artifacts.names import MAX_NAME_BYTES, checked_file_name, one_line

_MAX_PATH_CHARACTERS = 1024


def _stays_inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or str(PurePosixPath(path)) != path:
        raise ValueError(f"path '{path[:200]}' is not a plain path inside the artifact")
    if len(path) > _MAX_PATH_CHARACTERS or max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
        raise ValueError(f"path '{path[:40]} …' is too long")
    return one_line(path)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PathInside = Annotated[str, AfterValidator(_stays_inside)]
FileName = Annotated[str, AfterValidator(checked_file_name)]
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Line = Annotated[str, Field(max_length=4096), AfterValidator(one_line)]
