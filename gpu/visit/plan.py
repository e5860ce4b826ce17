"""One visit to a machine with a GPU: all parts one after the other, within their limits, results kept as they come."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import IO, Any, cast

from ettin.artifacts.errors import EttinError, HardwareError
from ettin.artifacts.targets import target_named
from ettin.artifacts.tolerances import REDUCED_RATIO
from ettin.gpu.visit.parts import PARTS
from ettin.gpu.visit.report import Task, received
from ettin.runtimes.commands import console


class Visit:
    """A visit.

    Args:
        task: what is measured.
        limits_s: seconds of each part, by name, in the order in which they are done.
        save: writes the result so far and the machine, as one of the processes described it.
    """

    def __init__(
        self, task: Task, limits_s: Mapping[str, float], save: Callable[[dict[str, Any], dict[str, Any]], None]
    ) -> None:
        self.task, self._limits_s, self._save = task, limits_s, save
        self.result: dict[str, Any] = {"device": task.device, "parts": {}, "paths": {}}
        self._machine: dict[str, Any] = {}

    def run(self) -> None:
        """Does all parts. One that fails or runs out of time says so in the result, and the next one follows.

        Raises:
            HardwareError: there is no GPU, or none that can run any of it.
            EttinError: a part failed or was killed; the others were done.
        """
        left = list(self._limits_s)
        while left:
            with _Process(self.task, {name: self._limits_s[name] for name in left}) as process:
                while left and process.is_usable:
                    name = left.pop(0)
                    with console.step(f"{name}: {PARTS[name].about}"):
                        self._follow(name, process)
        failed = [name for name, about in self.result["parts"].items() if about["failed"]]
        if failed:
            raise EttinError(f"{len(failed)} of {len(self._limits_s)} parts failed: {', '.join(failed)}")

    def _follow(self, name: str, process: "_Process") -> None:
        start, limit_s = time.monotonic(), self._limits_s[name]
        about: dict[str, Any] = {"limit_s": limit_s, "stopped": "not finished", "failed": True}
        last: dict[str, Any] = {}
        self.result["parts"][name] = about
        for message in process.messages(limit_s):
            self._machine = message.get("machine", self._machine)
            if "key" in message:
                pieces, key, value = self.result.setdefault(name, {}), message["key"], message["value"]
                problem = value.get("problem") if isinstance(value, dict) else None
                if problem or key not in pieces:
                    console.note(f"    {key}{f': {problem}' if problem else ''}")
                pieces[key] = value
            if "end" in message:
                about |= {"stopped": message["end"], "failed": not process.is_usable}
                about |= {key: message[key] for key in ("traceback",) if key in message}
            about["seconds"] = round(time.monotonic() - start, 1)
            self.result["paths"] = paths(self.result)
            self._save(self.result, self._machine)
            last = message
        if last.get("hopeless"):
            raise HardwareError(last["end"])
        if about["stopped"]:
            console.note(f"  {name}: {about['stopped']}", fg="yellow")


class _Process:
    """A process that does parts, see `parts.main`; whatever it started ends with it."""

    def __init__(self, task: Task, limits_s: Mapping[str, float]) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see `__exit__`)
        self._scratch = tempfile.TemporaryDirectory()  # a process that is killed leaves checkpoints there
        words = [f"{name}={limit_s}" for name, limit_s in limits_s.items()]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        command = [sys.executable, "-P", "-m", "ettin.gpu.visit.parts", *words]
        variables = {**os.environ, "TMPDIR": self._scratch.name}
        self._process = subprocess.Popen(command, **pipes, text=True, env=variables, start_new_session=True)
        self.is_usable = True
        with suppress(BrokenPipeError):
            cast(IO[str], self._process.stdin).write(task.to_json() + "\n")
            cast(IO[str], self._process.stdin).close()

    def messages(self, limit_s: float) -> Iterator[dict[str, Any]]:
        """The messages of one part, as they come; the last one has the key "end"."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(limit_s, kill)
        timer.start()
        try:
            for line in cast(IO[str], self._process.stdout):
                message = received(line)
                if message is not None:
                    self.is_usable = not message.get("end") or message["end"].startswith("out of time")
                    yield message
                    if "end" in message:
                        return
        finally:
            timer.cancel()
        self.is_usable = False
        yield {"end": f"killed after {limit_s:.0f} s" if late.is_set() else self._reason()}

    def _reason(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        line = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        return f"died with signal {-code}: {line}" if code < 0 else line

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._process.wait()
        cast(IO[str], self._process.stdout).close()
        self._errors.close()
        self._scratch.cleanup()


def paths(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a visit says of each way to run an artifact, by its name in `ettin.gpu.marks`: "TARGET.DEVICE" or "TARGET".

    One passed if all that ran of it passed: our graph in bf16 (a mean error against fp32 of at most 1.5 times that of
    FlashAttention-2 in transformers), and every artifact that was verified.
    """
    device, found = result["device"], dict[str, dict[str, Any]]()
    own = result.get("parity", {}).get("rows", {}).get("ours")
    if own is not None:
        ratio = own.get("of_reference")
        passed = ratio is not None and ratio <= REDUCED_RATIO["bf16"]
        keys = ("mean_abs_error", "max_abs_error", "of_reference", "mean_error_of_reference", "problem")
        found[f"transformers.{device}"] = {"passed": passed, **{key: own[key] for key in keys if key in own}}
    for name, row in result.get("artifacts", {}).items():
        if "target" in row:
            where = row.get("device", device)
            is_compiled = target_named(row["target"]).is_compiled
            path = found.setdefault(row["target"] if is_compiled else f"{row['target']}.{where}", {"passed": True})
            path["passed"] &= row.get("passed", False)
            path.setdefault("artifacts", {})[name] = row.get("passed", False)
    return found
