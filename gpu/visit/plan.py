"""One visit to a machine with a GPU: all parts one after the other, within their limits, results kept as they come."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ettin.artifacts.errors import EttinError, HardwareError
from ettin.artifacts.targets import target_named
from ettin.artifacts.tolerances import REDUCED_RATIO
from ettin.bench.child import Child
from ettin.gpu.visit.parts import PARTS
from ettin.gpu.visit.report import Task
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
            words = ["-m", "ettin.gpu.visit.parts", *(f"{name}={self._limits_s[name]}" for name in left)]
            with (
                tempfile.TemporaryDirectory() as scratch,  # a process that is killed leaves checkpoints there
                Child(words, {"TMPDIR": scratch}, has_session=True) as process,
            ):
                process.tell(asdict(self.task), is_last=True)
                is_usable = True
                while left and is_usable:
                    name = left.pop(0)
                    with console.step(f"{name}: {PARTS[name].about}"):
                        is_usable = self._follow(name, process)
        failed = [name for name, about in self.result["parts"].items() if about["failed"]]
        if failed:
            raise EttinError(f"{len(failed)} of {len(self._limits_s)} parts failed: {', '.join(failed)}")

    def _follow(self, name: str, process: Child) -> bool:
        """Records a part, piece by piece, until the process says that it ended. Can the process do the next one?"""
        start, limit_s = time.monotonic(), self._limits_s[name]
        about: dict[str, Any] = {"limit_s": limit_s, "stopped": "not finished", "failed": True}
        self.result["parts"][name] = about
        process.end_at(start + limit_s, f"killed after {limit_s:.0f} s")
        message: dict[str, Any] = {}
        while "end" not in message:
            try:
                message = process.answer()
            except EttinError as error:
                message = {"end": str(error)}
            self._machine = message.get("machine", self._machine)
            if "key" in message:
                pieces, key, value = self.result.setdefault(name, {}), message["key"], message["value"]
                problem = value.get("problem") if isinstance(value, dict) else None
                if problem or key not in pieces:
                    console.note(f"    {key}{f': {problem}' if problem else ''}")
                pieces[key] = value
            if "end" in message:
                stopped = message["end"]
                about |= {"stopped": stopped, "failed": bool(stopped) and not stopped.startswith("out of time")}
                about |= {key: message[key] for key in ("traceback",) if key in message}
            about["seconds"] = round(time.monotonic() - start, 1)
            self.result["paths"] = paths(self.result)
            self._save(self.result, self._machine)
        if message.get("hopeless"):
            raise HardwareError(message["end"])
        if about["stopped"]:
            console.note(f"  {name}: {about['stopped']}", fg="yellow")
        return not about["failed"]


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
