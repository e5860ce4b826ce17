"""The one runtime of a worker process."""

import functools
import os
from typing import Any

from ettin.runtimes.base import Runtime
from ettin.runtimes.loading import load


def process_runtime(artifact: str, **settings: Any) -> Runtime:
    """The runtime of this process: loaded at the first call, and again in a process that is forked from this one.

    It stays loaded until the process ends, so don't close it.

    Args:
        artifact: see `load`.
        settings: other arguments of `load`.

    Raises:
        EttinError: see `load`.
    """
    return _loaded(os.getpid(), artifact, tuple(sorted(settings.items())))


@functools.cache
def _loaded(_: int, artifact: str, settings: tuple[tuple[str, Any], ...]) -> Runtime:
    return load(artifact, **dict(settings))
