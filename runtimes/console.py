"""What the commands share: messages on stderr, results on stdout, one line for an error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console

from ettin.artifacts.errors import EttinError

_WIDTH_IN_PIPES = 200  # rich assumes 80 there, and would cut tables
stderr = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else _WIDTH_IN_PIPES)
stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH_IN_PIPES)


def run(command: Callable[..., Any]) -> NoReturn:
    """Runs a click command. Errors raised on purpose become one line on stderr and exit code 1."""
    try:
        command(standalone_mode=True)
    except EttinError as error:
        stderr.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        stderr.print("interrupted; nothing was published", style="red")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(0)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Shows a step of a longer job and the time that it took, on stderr."""
    start = time.perf_counter()
    with stderr.status(f"{what} …") if stderr.is_terminal else _nothing():
        yield
    stderr.print(f"  {what}  [dim]{time.perf_counter() - start:.1f} s[/dim]")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def example_epilog(*lines: str) -> str:
    """Examples at the end of a help text, one a line, as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
