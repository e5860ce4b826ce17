"""The parts of a visit, in order of worth, and the process that does them: python -m ettin.gpu.visit.parts."""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from ettin.artifacts.errors import HardwareError
from ettin.bench.machine import machine
from ettin.gpu.visit.report import Report, Task, reason_of, send

_MARGIN = 0.05  # of the limit of a part: it ends by itself this much earlier than it would be killed


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        run: "module:function"; the function takes a `Task` and a `Report`.
        limit_s: seconds after which it is killed.
        about: what it measures, in words.
    """

    run: str
    limit_s: float
    about: str

    def function(self) -> Callable[[Task, Report], None]:
        """What does the work."""
        module, _, name = self.run.partition(":")
        function: Callable[[Task, Report], None] = getattr(import_module(module), name)
        return function


# The limits add up to less than nine minutes.
PARTS: dict[str, Part] = {
    "parity": Part("ettin.gpu.visit.parity:run", 75, "errors of every setting against fp32"),
    "speed": Part("ettin.gpu.visit.speed:run", 255, "pairs per second of every size"),
    "kernels": Part("ettin.gpu.visit.kernels:run", 60, "where the time goes"),
    "attention": Part("ettin.gpu.visit.attention:run", 30, "calls of the attention kernel alone"),
    "artifacts": Part("ettin.gpu.visit.verified:run", 25, "ettin-verify, and what engines say"),
    "compile": Part("ettin.gpu.visit.speed:run_slow_starters", 85, "pairs per second of settings that are compiled"),
}


def main() -> None:
    """Does the parts that the order on stdin names, with their limits in seconds; ends after one that fails."""
    from ettin.gpu.visit.models import kernel_on  # not where this is imported for the names: it needs torch

    task = Task.from_json(sys.stdin.readline())
    for word in sys.argv[1:]:
        name, _, limit_s = word.partition("=")
        report = Report(name, time.monotonic() + (1 - _MARGIN) * float(limit_s))
        try:
            kernel_on(task.device)
            send(machine=machine())
            PARTS[name].function()(task, report)
        except HardwareError as error:
            send(part=name, end=str(error), hopeless=True)
            return
        except Exception as error:
            send(part=name, end=reason_of(error), traceback=traceback.format_exc()[-2000:])
            return  # a failed kernel can make all later ones fail: the next part gets a new process
        send(part=name, end=f"out of time, skipped: {', '.join(report.skipped)}" if report.skipped else None)


if __name__ == "__main__":
    main()
