"""The one runtime of a worker process."""

import functools
import os
import threading
from typing import Any

from ettin.runtimes.base import Runtime
from ettin.runtimes.loading import load

_LOCKS: dict[int, threading.Lock] = {}  # by process


def process_runtime(artifact: str, **settings: Any) -> Runtime:
    """The runtime of this process: loaded at the first call, and again in a process that is forked from this one.

    It stays loaded until the process ends, so don't close it.

    Args:
        artifact: see `load`.
        settings: other arguments of `load`.

    Raises:
        EttinError: see `load`.
    """
    process = os.getpid()
    with _LOCKS.setdefault(process, threading.Lock()):  # threads load once; a forked process has a lock of its own
        return _loaded(process, artifact, tuple(sorted(settings.items())))


@functools.cache
def _loaded(_: int, artifact: str, settings: tuple[tuple[str, Any], ...]) -> Runtime:
    return load(artifact, **dict(settings))
