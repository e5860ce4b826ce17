"""What `ettin-export` shows besides its steps: lists, plans, results, and what works on this machine."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from packaging.requirements import Requirement

from ettin.artifacts.errors import HardwareError, requirement
from ettin.artifacts.targets import Component, Target, registered_targets
from ettin.export.options import Job
from ettin.export.source.sizes import SIZES
from ettin.runtimes import machine
from ettin.runtimes.commands import console
from ettin.runtimes.engines import openvino_kernels
from ettin.runtimes.machine import gpus, own_source

if TYPE_CHECKING:  # these import torch
    from ettin.export.pipeline import Export
    from ettin.runtimes.verify import Verification

REFERENCE_PACKAGES = ("torch", "transformers", "sentence_transformers", "safetensors")
_PACKAGES = (
    *REFERENCE_PACKAGES, "huggingface_hub", "tokenizers", "onnx", "onnxruntime", "openvino", "tensorrt",
    "tensorrt_rtx",
)  # fmt: skip
# Servers, the extra of each, and the packages that it installs.
_SERVERS = (
    ("ettin-serve", "serve", ("fastapi", "uvicorn", "prometheus_client")),
    ("ettin-serve --triton", "gateway", ("fastapi", "uvicorn", "prometheus_client", "tritonclient")),
    ("ettin-triton", "triton", ("tritonclient",)),
    ("ettin-triton --serve", "triton", ("pytriton", "tritonclient")),
)


@dataclass(frozen=True)
class Row:
    """One export of a run with `--all`."""

    job: Job
    verification: "Verification | None"  # None: it failed, or the artifact can't be run here
    problem: str | None  # why it failed


def show_list() -> None:
    """Sizes, targets and precisions."""
    demo = ["demo", "2,042,113", "comes with this package", ""]
    sizes = [[size.name, f"{size.parameters:,}", size.hub_id, size.revision[:12]] for size in SIZES.values()]
    console.table([demo, *sizes], ["size", "parameters", "hub id", "pinned revision"])
    click.echo()
    rows = [
        [target.name, ", ".join(target.precisions), _devices(target), target.runs_on] for target in registered_targets()
    ]
    console.table(rows, ["target", "precisions (first: default)", "devices", "runs on"])


def _devices(target: Target) -> str:
    """The devices of a target, and why one is experimental."""
    marks = [target.component(device).experimental for device in target.devices]
    return ", ".join(
        f"{device} (experimental: {mark})" if mark else device
        for device, mark in zip(target.devices, marks, strict=True)
    )


def show_plan(export: "Export", jobs: list[Job]) -> None:
    """What would be done."""
    for job in jobs:
        click.echo(
            f"would write {job.target} {job.precision}, about {export.expected_bytes(job) / 2**20:.0f} MiB, up to "
            f"{export.max_length} tokens a pair, to {job.output}, once its scores are proven"
        )


def show_all(rows: list[Row]) -> None:
    """The report of a run with `--all`."""
    lines = []
    for row in rows:
        figures = ["–"] * 3
        if row.verification is not None:
            parity = row.verification.parity
            values = ((parity.max_abs_error, ".1e"), (parity.mean_abs_error, ".1e"), (parity.spearman, ".6f"))
            figures = ["–" if value is None else format(value, form) for value, form in values]
        size, note = "–", row.problem or ""
        if row.problem is None:
            files = (path.stat().st_size for path in row.job.output.rglob("*") if path.is_file())
            size = f"{sum(files) / 2**20:.1f}"
            note = f"{row.job.output}{'' if row.verification else ' (not verified)'}"
        lines.append([row.job.target, row.job.precision, *figures, size, note])
    headers = ["target", "precision", "max |Δ|", "mean |Δ|", "Spearman", "MiB", "artifact or problem"]
    console.table(lines, headers, err=True)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    what: str
    ok: bool | None  # None: a plain fact
    detail: str
    fix: str = ""  # the command that repairs it


def show_doctor() -> None:
    """Prints the installed packages, the targets and servers that work here, and a repair command for each problem.

    It changes nothing and imports no engine.
    """
    marks = {True: click.style("ok", fg="green"), False: click.style("no", fg="red"), None: ""}
    rows = []
    for finding in (*_machine(), *_packages(), *_targets(), *_servers()):
        rows.append([marks[finding.ok], finding.what, finding.detail])
        if finding.fix:
            rows.append(["", "", click.style(f"Run: {finding.fix}", fg="yellow")])
    console.table(rows)


def _machine() -> Iterator[Finding]:
    flags = " ".join(flag for flag in machine.INTERESTING if flag in machine.flags())
    limit = f"; limited by ONEDNN_MAX_CPU_ISA={machine.isa_limit()}" if machine.isa_limit() else ""
    bf16 = "bf16 arithmetic" if machine.has_bf16() else "no bf16 arithmetic (bf16 artifacts run in f32)"
    cpu = f"{machine.model_name()}, {machine.available_cpus()} usable; {flags}{limit}; {bf16}"
    yield Finding("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("cpu", None, cpu)
    if _has("openvino"):
        yield _attention_kernel()
    try:
        names = "; ".join(f"{gpu.name}, {gpu.arch}, driver {gpu.driver}" for gpu in gpus())
        yield Finding("gpu", None, names or "none (no nvidia-smi)")
    except HardwareError as error:
        yield Finding("gpu", False, str(error))


def _attention_kernel() -> Finding:
    problem = openvino_kernels.problem()
    if problem is None:
        return Finding(
            "attention kernel",
            None,
            "runs openvino artifacts: " + ", ".join(each.name for each in openvino_kernels.runnable()),
        )
    if not problem.install_again:
        return Finding("attention kernel", None, problem.why)
    # Without build isolation it is compiled against the OpenVINO that is installed, not against the newest.
    again = f"pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation {own_source()}"
    return Finding("attention kernel", False, problem.why, f"pip install 'setuptools>=77', then {again}")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def missing(modules: Sequence[str]) -> list[str]:
    """Those of the modules that are not installed."""
    return [module for module in dict.fromkeys(modules) if not _has(module)]


def _install(*requirements: str) -> str:
    """The command that installs these: one word for each package, with all of its extras."""
    extras: dict[str, list[str]] = {}
    for needed in map(Requirement, requirements):
        extras.setdefault(needed.name, []).extend(needed.extras)
    words = [f'"{requirement(",".join(dict.fromkeys(names)), package)}"' for package, names in extras.items()]
    return " ".join(["pip install", *words]) if words else ""


def _packages() -> Iterator[Finding]:
    installed = importlib.metadata.packages_distributions()
    for module in filter(_has, _PACKAGES):
        names = sorted(set(installed.get(module, [module])))
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        both = module == "onnxruntime" and len(names) > 1
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them" if both else ""
        yield Finding(module, not both, versions, fix)


def _targets() -> Iterator[Finding]:
    for target in registered_targets():
        to_run = missing(target.runtime.packages)
        to_export = missing((*REFERENCE_PACKAGES, *target.writer.packages))
        if target.is_compiled and not to_export:
            detail = _compiled_detail(target, to_run)
        elif to_export and to_run:
            detail = f"neither export nor run: no {', '.join(dict.fromkeys(to_export + to_run))}"
        elif to_export:
            detail = f"run only: to export, no {', '.join(to_export)}"
        elif to_run:
            detail = f"export only with --allow-unverified: to run, no {', '.join(to_run)}"
        else:
            detail = "export and run"
        needed = [target.runtime.requirement] if to_run else []
        needed += [requirement("export"), target.writer.requirement] if to_export else []
        yield Finding(f"target {target.name}", not needed, detail + _mark(target.runtime), _install(*needed))
        for device in target.devices[1:]:
            yield _device(target, device)


def _mark(component: Component) -> str:
    return f"; experimental: {component.experimental}" if component.experimental else ""


def _device(target: Target, device: str) -> Finding:
    """What is there for a further device. A plain fact: a machine without a GPU lacks nothing."""
    component = target.component(device)
    absent = missing(component.packages)
    detail = f"no {', '.join(absent)}" if absent else f"{', '.join(component.packages)} installed"
    return Finding(f"target {target.name} on {device}", None, detail + _mark(component))


def _compiled_detail(target: Target, to_run: list[str]) -> str:
    """What this machine can do with a target whose engines are compiled for one GPU architecture."""
    builder, has_kits = target.runtime.packages[0], target.name == "trt"
    if builder in to_run:
        return f"neither build nor run: no {builder}{'; a build kit can be written (--build-kit)' if has_kits else ''}"
    try:
        present = gpus()
    except HardwareError:
        present = []
    if not present:
        ahead = "build kits only (--build-kit)" if has_kits else "build ahead of time (--arch, --allow-unverified)"
        return f"{ahead}; to run, no GPU"
    run = f"; to run, no {', '.join(to_run)}" if to_run else " and run"
    return f"build{run}: {present[0].arch}"


def _servers() -> Iterator[Finding]:
    for what, extra, modules in _SERVERS:
        absent = missing(modules)
        detail = f"no {', '.join(absent)}" if absent else "installed"
        yield Finding(what, not absent, detail, _install(requirement(extra)) if absent else "")
