"""A Python process that is asked and answers in lines of JSON, and is killed when its time is over."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, Self, cast

from ettin.artifacts.errors import EttinError

_MARK = '{"ettin"'  # begins an answer; libraries print to stdout, too


class Child:
    """A process that runs until the block ends. It prints an answer as `{"ettin": {…}}`.

    Args:
        words: the command after the interpreter.
        variables: of its environment, besides those of this process.
        python: the interpreter.
        has_session: it gets a session of its own, and whatever it started is killed with it.
    """

    def __init__(
        self, words: Sequence[str], variables: Mapping[str, str], python: str = sys.executable,
        has_session: bool = False,
    ) -> None:  # fmt: skip
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see `__exit__`)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        command = [python, "-P", *words]  # -P: no folder of ours goes before the standard library
        environment = {**os.environ, **variables}
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=has_session)
        self._orders, self._answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        self._has_session = has_session
        self._late: str | None = None  # the reason, if it was killed because its time was over
        self._timer = threading.Timer(0, self._kill)

    def end_at(self, until: float, reason: str = "out of time", if_silent: bool = False) -> None:
        """Lets the process live until then (`time.monotonic()`), and no longer; `if_silent`: if no answer waits."""
        self._timer.cancel()
        left_s = min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)
        self._timer = threading.Timer(left_s, self._kill_late, (reason, if_silent))
        self._timer.daemon = True
        self._timer.start()

    def _kill_late(self, reason: str, if_silent: bool) -> None:
        if not if_silent or not select.select([self._answers], [], [], 0)[0]:
            self._late = reason
            self._kill()

    def _kill(self) -> None:
        self._process.kill()
        if self._has_session:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def tell(self, order: Mapping[str, Any], is_last: bool = False) -> None:
        """Sends an order that has no answer. To a process that died nothing is sent: its next answer says why."""
        with suppress(BrokenPipeError):
            self._orders.write(json.dumps(order, default=os.fspath) + "\n")
            self._orders.flush()
            if is_last:
                self._orders.close()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Sends an order and waits for its answer; see `answer`."""
        self.tell(order)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer; an EttinError with the reason if it is a "problem", or the process died or was too late."""
        for line in self._answers:
            if line.startswith(_MARK):
                answer: dict[str, Any] = json.loads(line)["ettin"]
                if "problem" in answer:
                    raise EttinError(answer["problem"])
                return answer
        code = self._process.wait()
        self._errors.seek(0)
        line = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        raise EttinError(self._late or (f"died with signal {-code}: {line}" if code < 0 else line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._orders.close()
        self._answers.close()
        self._errors.close()
