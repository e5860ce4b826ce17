"""Targets: the kinds of artifact that can be written and run, and the devices that they run on.

A target is one description. Packages register theirs under the entry-point group `ettin.targets`; the name of the entry
point is the name of the target. What runs a target on a further device is a component under the group `ettin.devices`,
whose name is that of the target and that of the device. This project registers its own targets and devices in the same
way, in `pyproject.toml`. The command line, the loader, the doctor, manifests and Triton repositories take all that they
know of a target from there.

Example, in the `pyproject.toml` of another package:

    [project.entry-points."ettin.targets"]
    toy = "toy_package:TOY"

    [project.entry-points."ettin.devices"]
    "toy.cuda" = "toy_package:TOY_ON_CUDA"
"""

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from typing import Any

from ettin.artifacts.errors import MissingDependency, UsageError, requirement

GROUP = "ettin.targets"
DEVICES = "ettin.devices"
_WORDS = {GROUP: "target", DEVICES: "device"}  # what errors call an entry


@dataclass(frozen=True)
class Component:
    """Code that runs or writes a target. It is imported on use.

    Args:
        path: "module:name" of a class.
        packages: modules that it imports, the engine's own first.
        extra: the extra that installs them; "" for none.
        distribution: the package on the index that has this extra.
        experimental: why nobody should rely on it yet, in a few words ("not yet run on a GPU"); "": no reason. Lists,
            the doctor, manifests and `load` say it.
    """

    path: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    distribution: str = "ettin-export"
    experimental: str = ""

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
        runtime: a subclass of `ettin.runtimes.Runtime`, for `device`.
        writer: a subclass of `ettin.export.writer.Writer`.
        device: what `runtime` runs on. Further devices are entries of the group `ettin.devices`.
        is_compiled: its engine is compiled for one GPU architecture.
        shared_precisions: those that one artifact can hold together: their inputs and outputs are the same.
        triton_backends: backends of Triton Inference Server that serve it: "python" (our runtime) and at most one that
            opens the engine's own file; empty: Triton can't serve it.
    """

    name: str
    precisions: tuple[str, ...]
    runs_on: str
    runtime: Component
    writer: Component
    device: str = "cpu"
    is_compiled: bool = False
    shared_precisions: tuple[str, ...] = ()
    triton_backends: tuple[str, ...] = ("python",)

    @property
    def native_triton_backend(self) -> str | None:
        """Triton's own backend that opens the engine's file, if there is one."""
        return next((backend for backend in self.triton_backends if backend != "python"), None)

    @property
    def devices(self) -> list[str]:
        """Names of the devices that it runs on, its own first."""
        parts = (name.rpartition(".") for name in _registered(DEVICES))
        return [self.device, *(device for target, _, device in parts if target == self.name)]

    def device_for(self, needed: str) -> str:
        """The device of an artifact that needs `needed`, as its manifest says: "any" is the target's own."""
        return self.device if needed == "any" else needed

    def component(self, device: str) -> Component:
        """What runs it on a device.

        Raises:
            UsageError: it does not run on this device; lists those that it runs on.
        """
        if device not in self.devices:
            raise UsageError(
                f"target '{self.name}' does not run on device '{device}', expected one of: {', '.join(self.devices)}"
            )
        if device == self.device:
            return self.runtime
        name = f"{self.name}.{device}"
        component = _imported(DEVICES, name)
        if not isinstance(component, Component):
            value = _registered(DEVICES)[name].value
            raise UsageError(f"device '{name}': {value} is {component!r:.200}, expected a Component")
        return component

    def runtime_class(self, device: str | None = None) -> Any:
        """The class that runs it on a device; None: its own.

        Raises:
            UsageError: it does not run on this device.
            MissingDependency: its engine is not installed.
        """
        where = "" if device in (None, self.device) else f" on device '{device}'"
        return self.component(device or self.device).load(f"target '{self.name}'{where}")

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


def _entries(group: str) -> Iterator[EntryPoint]:
    """The entry points of all distributions. The library's own list looks at one of several with the same name alone.

    A checkout that is the current folder may hold the metadata of an earlier installation, which has none.
    """
    for distribution in distributions():
        yield from distribution.entry_points.select(group=group)


@functools.cache
def _registered(group: str) -> dict[str, EntryPoint]:
    registered: dict[str, EntryPoint] = {}
    for entry in _entries(group):
        other = registered.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UsageError(
                f"{_WORDS[group]} '{entry.name}' is registered twice, as {other.value} and as {entry.value}. Run: "
                f"pip uninstall {_distribution(other)} or {_distribution(entry)}"
            )
    return dict(sorted(registered.items()))


@functools.cache
def _imported(group: str, name: str) -> Any:
    """What an entry names; raises `UsageError` if that can't be imported."""
    entry = _registered(group)[name]
    try:
        return entry.load()
    except Exception as error:
        raise UsageError(
            f"{_WORDS[group]} '{name}': its description {entry.value} can't be imported ({type(error).__name__}: "
            f"{error}). Run: pip install --force-reinstall {_distribution(entry)}"
        ) from error


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "the package that registers it"


def target_names() -> list[str]:
    """Names of all registered targets, in alphabetical order."""
    return list(_registered(GROUP))


def registered_targets() -> list[Target]:
    """All registered targets, in alphabetical order of their names."""
    return [target_named(name) for name in target_names()]


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: no such target (lists the registered ones), or its description can't be imported.
    """
    registered = _registered(GROUP)
    if not registered:
        raise UsageError(
            "no target is registered, so the installation of ettin-export is incomplete or older than its code. Run: "
            "pip install --force-reinstall --no-deps ettin-export (in a checkout: pip install -e .)"
        )
    if name not in registered:
        raise UsageError(f"unknown target '{name}', expected one of: {', '.join(registered)}")
    target = _imported(GROUP, name)
    if not isinstance(target, Target) or target.name != name:
        value = registered[name].value
        raise UsageError(f"target '{name}': {value} is {target!r:.200}, expected a Target named '{name}'")
    return target
