"""Worker threads, and how engines survive forks and the end of their process.

An engine's threads do not survive a fork. A forked process can't use the engine, and can't free it either: OpenVINO's
destructors wait for its threads for ever (seen with 2026.4.1). So the scheduler refuses to score in a forked process,
and this module keeps engines until it ends.

ONNX Runtime 1.32 starts a telemetry thread when it is imported, for which a process that was forked later waits at its
end, for ever. This module sets ORT_DISABLE_TELEMETRY, unless the user did, so that the thread is not started.
"""

import atexit
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

from ettin.artifacts.errors import Closed, HardwareError

PAUSE_S = 0.01  # after an error that belongs to no request

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class Threads:
    """Named daemon threads that repeat a piece of work, whatever it raises. The owner's lock guards this object."""

    def __init__(self) -> None:
        self._alive: set[threading.Thread] = set()

    @property
    def names(self) -> set[str]:
        """Names of the threads that work or wait for work."""
        return {thread.name for thread in self._alive}

    def start(self, name: str, count: int, turn: Callable[[], bool]) -> None:
        """Starts those of `count` threads that are missing; a thread ends when `turn` returns False.

        Raises `HardwareError` if the system starts no thread, and there is none of that name.
        """
        for number in range(count):
            full_name = f"{name}-{number}"
            if full_name in self.names:
                continue
            thread = threading.Thread(target=_repeat, args=(turn,), name=full_name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if any(other.startswith(name) for other in self.names):
                    return
                raise HardwareError(f"the system starts no more threads ({error}). Raise its limit") from None
            self._alive.add(thread)

    def leave(self) -> None:
        """Stops counting the calling thread, which is about to end, so that another is started in its place."""
        self._alive.discard(threading.current_thread())

    def others(self) -> set[threading.Thread]:
        """All but the calling thread."""
        return self._alive - {threading.current_thread()}


def join(threads: Iterable[threading.Thread], timeout_s: float) -> bool:
    """Waits for threads to end, and returns whether all did."""
    deadline_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _repeat(turn: Callable[[], bool]) -> None:
    while True:
        with suppress(BaseException):
            if not turn():
                return
            continue
        time.sleep(PAUSE_S)


class _Closable(Protocol):
    def close(self, reason: str) -> bool: ...


_holders: "weakref.WeakSet[Any]" = weakref.WeakSet()
_open: "weakref.WeakSet[_Closable]" = weakref.WeakSet()


def keep_in_children(holder: Any) -> None:
    """Never frees what `holder` refers to in a process that is forked from this one."""
    _holders.add(holder)


def _keep_all() -> None:
    for holder in list(_holders):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(vars(holder)))


def refuse_child(process: int) -> None:
    """Raises `Closed` in a process other than `process`, which loaded the engine."""
    if os.getpid() != process:
        raise Closed(
            f"this runtime was loaded in process {process}, from which process {os.getpid()} was forked; engines do "
            "not survive a fork. Load the artifact in each process after the fork, or start processes with the method "
            "'spawn'"
        )


def give_memory_back() -> None:
    """Returns free memory to the system; takes milliseconds.

    glibc keeps it otherwise: after large requests were abandoned, a server of 160 MiB stayed at 420 to 590.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # only glibc has it
    if trim is not None:
        trim(0)


def close_at_exit(scheduler: _Closable) -> None:
    """Closes `scheduler` before the interpreter ends, which engines do not survive."""
    _open.add(scheduler)


@atexit.register
def _close_all() -> None:
    for scheduler in list(_open):
        scheduler.close("the process is ending")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
