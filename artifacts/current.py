"""Reading what may be replaced meanwhile."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ettin.artifacts.errors import ArtifactError

_ATTEMPTS = 5

_Result = TypeVar("_Result")


def of_current(path: Path, use: Callable[[], _Result]) -> _Result:
    """Calls `use`, and again if it failed while another artifact took the place of the one at `path`.

    Raises:
        ArtifactError: what `use` raised about an artifact that has stayed, or in the last of a few attempts: a folder
            that changes again and again would keep the caller for ever.
    """
    for left in reversed(range(_ATTEMPTS)):
        before = _identity(path)
        try:
            return use()
        except ArtifactError:
            if not left or _identity(path) in (before, None):
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
