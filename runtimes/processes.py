"""Threads that no error ends, and what an engine needs from its process: its forks, its end, its memory.

An engine's threads do not survive a fork. A forked process can't use the engine, and can't free it either: OpenVINO's
destructors wait for its threads for ever (seen with 2026.4.1). The scheduler refuses to score there; here, engines are
kept until the forked process ends.

ONNX Runtime 1.32 starts a telemetry thread when it is imported, and a process that was forked after that never ends:
it waits for this thread at exit. The thread is not started if ORT_DISABLE_TELEMETRY is set. This module sets it unless
the user did.
"""

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

from ettin.artifacts.errors import Closed, HardwareError

PAUSE_S = 0.01  # after an error that belongs to no request


class Threads:
    """Named daemon threads that repeat a piece of work. Its owner's lock guards it."""

    def __init__(self) -> None:
        self._alive: set[threading.Thread] = set()

    @property
    def names(self) -> set[str]:
        """Names of the threads that work or wait for work."""
        return {thread.name for thread in self._alive}

    def start(self, name: str, count: int, turn: Callable[[], bool]) -> None:
        """Starts those of `count` threads that are missing.

        Args:
            name: what their names begin with.
            count: how many there should be.
            turn: one piece of work; False ends the thread.

        Raises:
            HardwareError: the system starts no thread, and there is none of that name.
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
        """The calling thread is about to end: it is not counted any more, so that another is started in its place."""
        self._alive.discard(threading.current_thread())

    def others(self) -> set[threading.Thread]:
        """All but the calling thread."""
        return self._alive - {threading.current_thread()}


def join(threads: Iterable[threading.Thread], timeout_s: float) -> bool:
    """Waits for threads to end; whether all did."""
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
