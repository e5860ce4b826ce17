"""What the commands share: messages on stderr, results on stdout, one line for an error."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click
from tabulate import tabulate

from ettin.artifacts.errors import EttinError


def run(command: Callable[..., Any]) -> NoReturn:
    """Runs a click command. Errors raised on purpose become one line on stderr and exit code 1."""
    try:
        command(standalone_mode=True)
    except EttinError as error:
        note(f"error: {error}", fg="red")
        sys.exit(1)
    except KeyboardInterrupt:
        note("interrupted; nothing was published", fg="red")
        sys.exit(130)
    sys.exit(0)


def note(text: str, **style: Any) -> None:
    """A line on stderr, styled (see `click.style`) where that is a terminal."""
    click.secho(text, err=True, **style)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Shows a step of a longer job and the time that it took, on stderr."""
    live = sys.stderr.isatty()
    if live:
        click.echo(f"  {what} …", nl=False, err=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        if live:
            click.echo(err=True)
        raise
    seconds = click.style(f"{time.perf_counter() - start:.1f} s", dim=True)
    click.echo(f"{chr(13) if live else ''}  {what}  {seconds}", err=True)


def table(rows: Sequence[Sequence[str]], headers: Sequence[str] = (), *, err: bool = False) -> None:
    """Prints columns, on stdout unless `err`."""
    click.echo(tabulate(rows, headers, tablefmt="plain", disable_numparse=True), err=err)


def example_epilog(*lines: str) -> str:
    """Examples at the end of a help text, one a line, as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
