"""A process around an engine: its forks, its end, its memory.

An engine's threads do not survive a fork. A forked process can't use the engine, and can't free it either: OpenVINO's
destructors wait for its threads for ever (seen with 2026.4.1). The scheduler refuses to score there; here, engines are
kept until the forked process ends.

ONNX Runtime 1.32 starts a telemetry thread when it is imported, and a process that was forked after that never ends:
it waits for this thread at exit. The thread is not started if ORT_DISABLE_TELEMETRY is set, as it is here unless the
user set it.
"""

import atexit
import ctypes
import os
import weakref
from typing import Any, Protocol

from ettin.artifacts.errors import Closed

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class _Closable(Protocol):
    def close(self, reason: str) -> bool: ...


_holders: "weakref.WeakSet[Any]" = weakref.WeakSet()
_open: "weakref.WeakSet[_Closable]" = weakref.WeakSet()


def keep_in_children(holder: Any) -> None:
    """What `holder` refers to is never freed in a process that is forked from this one."""
    _holders.add(holder)


def _keep_all() -> None:
    for holder in list(_holders):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(vars(holder)))


def refuse_child(process: int) -> None:
    """Refuses to score in a process that was forked from the one that loaded the engine.

    Args:
        process: the one that loaded it.

    Raises:
        Closed: this is another process.
    """
    if os.getpid() != process:
        raise Closed(
            f"this runtime was loaded in process {process}, from which process {os.getpid()} was forked; engines do "
            "not survive a fork. Load the artifact in each process after the fork, or start processes with the method "
            "'spawn'"
        )


def give_memory_back() -> None:
    """Returns free memory to the system; takes milliseconds.

    glibc keeps what it once needed: after large requests were abandoned, a server of 160 MiB stayed at 420 to 590.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc alone has it
    if trim is not None:
        trim(0)


def close_at_exit(scheduler: _Closable) -> None:
    """Batches of `scheduler` end before the interpreter does: engines do not survive its end."""
    _open.add(scheduler)


@atexit.register
def _close_all() -> None:
    for scheduler in list(_open):
        scheduler.close("the process is ending")


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_keep_all)
