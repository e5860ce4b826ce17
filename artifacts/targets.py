"""Targets: the kinds of artifact that can be written and run.

A target is one description. Packages register theirs under the entry-point group `ettin.targets`; the name of the entry
point is the name of the target. This project registers its own targets in the same way, in `pyproject.toml`. The
command line, the loader, the doctor, manifests and Triton repositories take all that they know of a target from there.

Example, in the `pyproject.toml` of another package:

    [project.entry-points."ettin.targets"]
    toy = "toy_package:TOY"
"""

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from typing import Any

from ettin.artifacts.errors import MissingDependency, UsageError, requirement

GROUP = "ettin.targets"


@dataclass(frozen=True)
class Component:
    """Code that runs or writes a target. It is imported on use.

    Args:
        path: "module:name" of a class.
        packages: modules that it imports, the engine's own first.
        extra: the extra that installs them; "" for none.
        distribution: the package on the index that has this extra.
    """

    path: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    distribution: str = "ettin-export"

    @property
    def requirement(self) -> str:
        """What pip installs the packages with, such as "ettin-export[onnx]"."""
        return requirement(self.extra, self.distribution)

    def load(self, what: str) -> Any:
        """Imports the class.

        Args:
            what: what needs it, for the error: "target 'trt'".

        Raises:
            MissingDependency: one of the packages is not installed. A broken installation raises its own error.
        """
        try:
            for package in self.packages:
                importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name not in {name for package in self.packages for name in (package, package.partition(".")[0])}:
                raise
            raise MissingDependency(what, str(error.name), self.extra, self.distribution) from None
        module, name = self.path.split(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of artifact.

    Args:
        name: the word that users say.
        precisions: what it can be written in; the first is the default.
        runs_on: one line for lists.
        runtime: a subclass of `ettin.runtimes.Runtime`.
        writer: a subclass of `ettin.export.writer.Writer`.
        is_compiled: its engine is compiled for one GPU architecture.
        shares_folder: one artifact can hold several precisions.
        triton_backends: backends of Triton Inference Server that serve it: "python" (our runtime) and at most one that
            opens the engine's own file; empty: Triton can't serve it.
    """

    name: str
    precisions: tuple[str, ...]
    runs_on: str
    runtime: Component
    writer: Component
    is_compiled: bool = False
    shares_folder: bool = False
    triton_backends: tuple[str, ...] = ("python",)

    @property
    def native_triton_backend(self) -> str | None:
        """Triton's own backend that opens the engine's file, if there is one."""
        return next((backend for backend in self.triton_backends if backend != "python"), None)

    def runtime_class(self) -> Any:
        """The class that runs it.

        Raises:
            MissingDependency: its engine is not installed.
        """
        return self.runtime.load(f"target '{self.name}'")

    def checked_precision(self, precision: str | None) -> str:
        """`precision`, or the default for None.

        Raises:
            UsageError: the target has no such precision; lists those it has.
        """
        if precision is None:
            return self.precisions[0]
        if precision not in self.precisions:
            valid = ", ".join(self.precisions)
            raise UsageError(f"target '{self.name}' has no precision '{precision}', expected one of: {valid}")
        return precision


def _entries() -> Iterator[EntryPoint]:
    """The entry points of all distributions. The library's own list looks at one of several with the same name alone.

    A checkout that is the current folder may hold the metadata of an earlier installation, which has none.
    """
    for distribution in distributions():
        yield from distribution.entry_points.select(group=GROUP)


@functools.cache
def _registered() -> dict[str, EntryPoint]:
    registered: dict[str, EntryPoint] = {}
    for entry in _entries():
        other = registered.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UsageError(
                f"target '{entry.name}' is registered twice, as {other.value} and as {entry.value}. Run: pip uninstall "
                f"{_distribution(other)} or {_distribution(entry)}"
            )
    return dict(sorted(registered.items()))


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "the package that registers it"


def target_names() -> list[str]:
    """Names of all registered targets, in alphabetical order."""
    return list(_registered())


def registered_targets() -> list[Target]:
    """All registered targets, in alphabetical order of their names."""
    return [target_named(name) for name in target_names()]


@functools.cache
def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: no such target (lists the registered ones), or its description can't be imported.
    """
    registered = _registered()
    if not registered:
        raise UsageError(
            "no target is registered, so the installation of ettin-export is incomplete or older than its code. Run: "
            "pip install --force-reinstall --no-deps ettin-export (in a checkout: pip install -e .)"
        )
    if name not in registered:
        raise UsageError(f"unknown target '{name}', expected one of: {', '.join(registered)}")
    entry = registered[name]
    try:
        target = entry.load()
    except Exception as error:
        raise UsageError(
            f"target '{name}': its description {entry.value} can't be imported ({type(error).__name__}: {error}). "
            f"Run: pip install --force-reinstall {_distribution(entry)}"
        ) from error
    if not isinstance(target, Target) or target.name != name:
        raise UsageError(f"target '{name}': {entry.value} is {target!r:.200}, expected a Target named '{name}'")
    return target
