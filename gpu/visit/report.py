"""What a part of a visit is told, and how it reports: piece by piece, so that a stop or a crash loses little."""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

MAX_LENGTH = 512  # tokens that pairs are truncated to, as in the release's measurements


@dataclass(frozen=True)
class Task:
    """What a visit measures, and with what.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        sizes: the released sizes whose speed is measured; "tiny" for a rehearsal.
        settings: names of `settings.SETTINGS` that are timed; none: all.
        checkpoint: folder of a checkpoint with trained weights, for parity; its tokenizer serves all sizes.
        data: text to score, see `ettin.bench.workloads.pairs_to_score`.
        artifacts: folder of artifacts that are verified on the device.
    """

    device: str
    sizes: tuple[str, ...]
    settings: tuple[str, ...]
    checkpoint: Path
    data: Path | None = None
    artifacts: Path | None = None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From one line of JSON."""
        values = json.loads(text)
        paths = {name: Path(values[name]) if values[name] else None for name in ("checkpoint", "data", "artifacts")}
        return cls(**{**values, **paths, "sizes": tuple(values["sizes"]), "settings": tuple(values["settings"])})


def send(**message: Any) -> None:
    """Sends a message to the process that started this one."""
    print(json.dumps({"ettin": message}), file=sys.__stdout__, flush=True)


def reason_of(error: BaseException) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]


class Report:
    """The results of one part, sent as they come.

    Args:
        part: its name.
        until: `time.monotonic()` at which the part should have ended.
    """

    def __init__(self, part: str, until: float) -> None:
        self.until, self.skipped = until, list[str]()
        self._part = part

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def piece(self, key: str, value: Any) -> None:
        """Sends one result."""
        send(part=self._part, key=key, value=value)

    def attempt(self, key: str, work: Callable[[], Any]) -> Any:
        """Does a piece of the work and sends its result, or why there is none; then None is returned, too.

        It is skipped if no time is left.
        """
        if self.left_s <= 0:
            self.skipped.append(key)
            return None
        try:
            value = work()
        except Exception as error:
            self.piece(key, {"problem": reason_of(error), "traceback": traceback.format_exc()[-2000:]})
            value = None
        else:
            self.piece(key, value)
        free_memory()
        return value


def free_memory() -> None:
    """Gives the GPU's memory that is not in use back, such as after one size and before the next."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
