"""What the commands share: messages on stderr, results on stdout, one line for an error, common options."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from tabulate import tabulate

from ettin.artifacts.errors import EttinError, shown
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.signatures import SIGNATURE_NAME
from ettin.runtimes.long_documents import POLICIES

# Options that several commands have. Those of `load` have the names of its arguments.
KEY_HELP = "Public key (PEM) whose holder must have signed the artifact."
KEY = click.option("--key", "trusted_key", type=click.Path(path_type=Path), help=KEY_HELP)
DEVICE = click.option("--device", help="Device to score on, see ettin-export --list.  [default: the artifact's]")
PRECISION = click.option("--precision", help="Precision to use, of several in the artifact.  [default: its first]")
THREADS = click.option("--threads", type=click.IntRange(1), help="Number of CPU threads.  [default: all]")
STREAMS = click.option(
    "--streams",
    type=click.IntRange(1),
    help="Number of batches scored at the same time.  [default: as many as threads]",
)
MAX_LENGTH = click.option("--max-length", type=click.IntRange(3), help="Number of tokens that pairs are truncated to.")


def long_documents(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that are fields of `LongDocuments`."""
    options = (
        click.option("--long-documents", type=click.Choice(POLICIES), help="Cut documents that do not fit, or score "
                     "them in overlapping chunks.  [default: truncate]"),
        click.option("--chunk-overlap", type=click.IntRange(0), help="With chunks: number of tokens that neighbouring "
                     "chunks share.  [default: 64]"),
        click.option("--top-chunks", type=click.IntRange(1), help="With chunks: number of best chunks whose mean is "
                     "the score.  [default: 1, the maximum]"),
        click.option("--max-tokens-per-doc", type=click.IntRange(1), help="Number of tokens that documents alone are "
                     "cut to.  [default: no limit]"),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def sign(artifact: Path, private_key: Path | None) -> None:
    """Signs an artifact, if there is a key, and says so."""
    if private_key is not None:
        with OpenArtifact(artifact) as opened:
            opened.sign(private_key)
        click.echo(f"signed: {SIGNATURE_NAME}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived: everything is cleaned up as after Ctrl-C."""


def run(command: click.Command, *, publishes: bool = False) -> NoReturn:
    """Runs a click command. Errors raised on purpose become one line on stderr and exit code 1.

    Args:
        command: the command.
        publishes: it makes something that is published when it is finished. SIGTERM then ends it as Ctrl-C does, and
            both say that nothing unfinished was published.
    """
    if publishes:
        signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        code = command.main(standalone_mode=False)  # an exit code where click ended it, as after --help
    except EttinError as error:
        note(f"error: {error}", fg="red")
        code = 1
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        is_terminated = isinstance(error.__cause__ or error, _Terminated)
        reason = "ended by SIGTERM" if is_terminated else "interrupted"
        note(reason + ("; nothing unfinished was published" if publishes else ""), fg="red")
        code = 128 + (signal.SIGTERM if is_terminated else signal.SIGINT)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise _Terminated


def note(text: str, **style: Any) -> None:
    """Prints a line on stderr, safe for a terminal (see `shown`), styled (see `click.style`) where that is one."""
    click.secho(shown(text), err=True, **style)


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
    """Examples for the end of a help text, one on each line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class Console:
    """Shows the progress of an export on stderr, see `ettin.export.options.Progress`."""

    def step(self, what: str) -> AbstractContextManager[None]:
        """A step and the time that it takes."""
        return step(what)

    def note(self, text: str) -> None:
        """A line of its own."""
        note(f"  {text}", fg="yellow")
