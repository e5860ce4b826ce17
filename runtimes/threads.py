"""Threads that no error ends."""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from ettin.artifacts.errors import HardwareError

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
