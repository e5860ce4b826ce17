"""Reading what may be replaced meanwhile."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ettin.artifacts.errors import ArtifactError

_RETRY_S = 5.0

_Result = TypeVar("_Result")


def of_current(path: Path, use: Callable[[], _Result]) -> _Result:
    """Calls `use`, and again if it failed while another artifact took the place of the one at `path`.

    Raises:
        ArtifactError: what `use` raised about an artifact that has stayed, or after some seconds: a folder that changes
            again and again would keep the caller for ever.
    """
    deadline_s = time.monotonic() + _RETRY_S
    while True:
        before = _identity(path)
        try:
            return use()
        except ArtifactError:
            if _identity(path) in (before, None) or time.monotonic() > deadline_s:
                raise


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
