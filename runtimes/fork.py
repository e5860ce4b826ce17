"""Engines in processes that were forked after an artifact was loaded.

An engine's threads do not survive a fork. A forked process can't use the engine, and can't free it either: OpenVINO's
destructors wait for its threads for ever (seen with 2026.4.1). The scheduler refuses to score there; here, engines are
kept until the forked process ends.

ONNX Runtime 1.32 starts a telemetry thread when it is imported, and a process that was forked after that never ends:
it waits for this thread at exit. The thread is not started if ORT_DISABLE_TELEMETRY is set, as it is here unless the
user set it.
"""

import ctypes
import os
import weakref
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_holders: "weakref.WeakSet[Any]" = weakref.WeakSet()


def keep_in_children(holder: Any) -> None:
    """What `holder` refers to is never freed in a process that is forked from this one."""
    _holders.add(holder)


def _keep_all() -> None:
    for holder in list(_holders):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(vars(holder)))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_keep_all)
