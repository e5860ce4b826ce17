"""What an export is asked for, and how it shows its progress. Importing this needs no torch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Shows how an export goes on."""

    def step(self, what: str) -> AbstractContextManager[None]:
        """A step that takes time: `with progress.step("verify"): …`."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know."""
        ...


class Silent:
    """Shows nothing, see `Progress`."""

    def step(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def note(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """One artifact to make.

    Args:
        target: name of a registered target.
        precision: one of the target's.
        output: its folder.
    """

    target: str
    precision: str
    output: Path


@dataclass(frozen=True)
class BuildOptions:
    """What the user chose for an engine that is compiled for one GPU architecture.

    Args:
        arch: compute capability, such as "sm_86"; None or "native": this machine's.
        kit: write what another machine needs to build the engine, not the engine.
        workspace_mib: scratch memory that kernels may take; None: all of the GPU's.
        timing_cache: "trt" only: file that keeps kernel timings for the next build; None: none is kept.
    """

    arch: str | None = None
    kit: bool = False
    workspace_mib: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Options:
    """What all artifacts of a run have in common.

    Args:
        max_length: tokens that they truncate to; None: the checkpoint's.
        verify_pairs: JSON lines with more pairs to verify on.
        calibration: JSON lines with pairs to calibrate int8 on; None: the project's own.
        force: replace artifacts that are already there.
        allow_unverified: publish what can't be run here, marked as unverified.
        command: what the user typed, for the manifest.
        build: for targets whose engines are compiled for one GPU architecture.
        sign: PEM file with the private key that artifacts are signed with; None: they are not signed.
    """

    max_length: int | None = None
    verify_pairs: Path | None = None
    calibration: Path | None = None
    force: bool = False
    allow_unverified: bool = False
    command: str = "ettin-export"
    build: BuildOptions = field(default_factory=BuildOptions)
    sign: Path | None = None
