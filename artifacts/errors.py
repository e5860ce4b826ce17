"""Every error that this project raises on purpose.

    EttinError
    ├── UsageError, InputError, ShapeError: arguments and texts
    ├── MissingDependency, HardwareError: this machine
    ├── DownloadError
    ├── CheckpointError
    │   └── UnsupportedCheckpoint
    ├── ArtifactError
    │   └── ManifestError, DamagedArtifact, SignatureError, NewerFormat, UnverifiedArtifact
    ├── BuildError, ScoringError: engines
    ├── Busy, Closed, Expired, ServerError: runtimes and servers
    └── OutputError, ParityError: exports

A message says what failed, what was found against what was expected, and what to run.
"""

from typing import Self

_MAX_CHARACTERS = 4000


def shown(text: str) -> str:
    """Makes text of unknown origin safe for a terminal: one line, no control sequences, at most 4,000 characters."""
    if len(text) > _MAX_CHARACTERS:
        text = text[: _MAX_CHARACTERS - 2] + " …"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def requirement(extra: str, distribution: str = "ettin-export") -> str:
    """What pip installs an extra with; "" is no extra."""
    return f"{distribution}[{extra}]" if extra else distribution


class EttinError(Exception):
    """Base of all errors that are raised on purpose. The text is one line for the user, see `shown`."""

    def __init__(self, text: str = "") -> None:
        super().__init__(shown(text))


class UsageError(EttinError, ValueError):
    """An argument that is unknown, out of its range, or contradicts another."""


class InputError(EttinError, TypeError, ValueError):
    """A pair, query or document that can't be scored."""


class MissingDependency(EttinError):
    """A package that an extra would install is absent.

    Args:
        what: what needs it, as the user named it: "target 'trt'".
        package: its name on the package index.
        extra: the extra that installs it; "" for none.
        distribution: the package on the index that has this extra.
    """

    def __init__(self, what: str, package: str, extra: str, distribution: str = "ettin-export") -> None:
        wanted = requirement(extra, distribution)
        super().__init__(f'{what} needs {package}, which is not installed. Run: pip install "{wanted}"')


class HardwareError(EttinError):
    """A device, provider or instruction set that this machine lacks."""


class DownloadError(EttinError):
    """The hub can't be reached, or does not have what was asked for."""


class CheckpointError(EttinError):
    """A checkpoint that can't be read."""


class UnsupportedCheckpoint(CheckpointError):
    """A checkpoint that is not a ModernBERT reranker in a form that can be exported."""


class ArtifactError(EttinError):
    """An artifact that can't be used."""


class ManifestError(ArtifactError):
    """A manifest that is not valid, or was edited."""


class DamagedArtifact(ArtifactError):
    """A file that is missing or differs from the manifest."""


class SignatureError(ArtifactError):
    """An artifact without a signature by the key that is trusted."""


class NewerFormat(ArtifactError):
    """An artifact written by a newer version of this project."""


class UnverifiedArtifact(ArtifactError):
    """An artifact whose scores were not verified yet."""


class ShapeError(EttinError, ValueError):
    """More pairs or tokens than an artifact was built for."""


class BuildError(EttinError):
    """An engine that could not be compiled."""


class ScoringError(EttinError):
    """An engine failed while it scored a batch; the cause is the engine's own exception."""

    @classmethod
    def caused_by(cls, error: BaseException) -> Self:
        """The error for an exception of an engine."""
        failure = cls(f"scoring failed: {type(error).__name__}: {error}".partition("\n")[0][:300])
        failure.__cause__ = error
        return failure


class Busy(EttinError):
    """A server has no room for another request now.

    Args:
        why: what the request would wait for.
        retry_after_s: seconds after which there may be room.
    """

    def __init__(self, why: str, retry_after_s: float) -> None:
        self.retry_after_s = max(1, round(retry_after_s))
        super().__init__(f"{why}. Try again in {self.retry_after_s} s")


class Closed(EttinError):
    """A runtime or server that was closed, or that a forked process inherited from its parent."""


class Expired(EttinError):
    """A request that was not done within its time limit."""


class ServerError(EttinError):
    """A server that does not start or answer."""


class OutputError(EttinError):
    """A folder that can't be written."""


class ParityError(EttinError):
    """Scores that differ from the reference by more than the tolerance."""
