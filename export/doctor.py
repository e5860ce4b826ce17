"""What this machine can export and run, and the exact fix for what it can't."""

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.targets import Target, targets
from ettin.runtimes import machine as cpu
from ettin.runtimes.engines import openvino_kernels
from ettin.runtimes.machine import gpus, own_source

_PACKAGES = (
    "torch", "transformers", "sentence_transformers", "huggingface_hub", "safetensors", "tokenizers", "onnx",
    "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx",
)  # fmt: skip
# What serves, its extra, and what that installs.
_SERVERS = (
    ("ettin-serve", "serve", ("fastapi", "uvicorn", "prometheus_client")),
    ("ettin-serve --triton", "gateway", ("fastapi", "uvicorn", "prometheus_client", "tritonclient")),
    ("ettin-triton", "triton", ("tritonclient",)),
    ("ettin-triton --serve", "triton", ("pytriton", "tritonclient")),
)
_GOLD = ("torch", "transformers", "sentence_transformers", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        what: what was looked at.
        ok: whether it works; None for a plain fact.
        detail: what was found.
        fix: the command that mends it.
    """

    what: str
    ok: bool | None
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Looks at the machine without changing it or importing an engine."""
    return [*_machine(), *_packages(), *_targets(), *_servers()]


def _machine() -> list[Finding]:
    known = [flag for flag in cpu.INTERESTING if flag in cpu.flags()]
    limit = f"; limited by ONEDNN_MAX_CPU_ISA={cpu.isa_limit()}" if cpu.isa_limit() else ""
    bf16 = "bf16 arithmetic" if cpu.has_bf16() else "no bf16 arithmetic (bf16 artifacts run in f32)"
    return [
        Finding("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("cpu", None, f"{cpu.model_name()}, {cpu.available_cpus()} usable; {' '.join(known)}{limit}; {bf16}"),
        *_kernels(),
        _gpu(),
    ]


def _kernels() -> list[Finding]:
    if not _has("openvino"):
        return []
    problem = openvino_kernels.problem()
    if problem is None:
        return [Finding("attention kernel", None, "runs openvino bf16 and int8")]
    if not problem.install_again:
        return [Finding("attention kernel", None, problem.why)]
    # Compiled against the OpenVINO that is installed, not against the newest.
    again = f"pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation {own_source()}"
    return [Finding("attention kernel", False, problem.why, f"pip install 'setuptools>=77', then {again}")]


def _gpu() -> Finding:
    try:
        found = gpus()
    except HardwareError as error:
        return Finding("gpu", False, str(error))
    names = "; ".join(f"{gpu.name}, {gpu.arch}, driver {gpu.driver}" for gpu in found)
    return Finding("gpu", None, names or "none (no nvidia-smi)")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _packages() -> list[Finding]:
    findings = []
    for module in _PACKAGES:
        if _has(module):
            distributions = importlib.metadata.packages_distributions().get(module, [module])
            names = sorted(set(distributions))
            versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
            both = module == "onnxruntime" and len(names) > 1
            fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them" if both else ""
            findings.append(Finding(module, not both, versions, fix))
    return findings


def _engine_detail(target: Target, missing: list[str]) -> str:
    """What this machine can do with a TensorRT target; exporting itself is possible."""
    try:
        found = gpus()
    except HardwareError:
        found = []
    if target.runtime.packages[0] in missing:
        kit = "; a build kit can be written (--build-kit)" if target.name == "trt" else ""
        return f"neither build nor run: no {target.runtime.packages[0]}{kit}"
    if not found:
        here = (
            "build kits only (--build-kit)"
            if target.name == "trt"
            else "build ahead of time (--arch, --allow-unverified)"
        )
        return f"{here}; to run, no GPU"
    run = f"; to run, no {', '.join(missing)}" if missing else " and run"
    return f"build{run}: {found[0].arch}"


def _servers() -> list[Finding]:
    findings = []
    for what, extra, modules in _SERVERS:
        missing = [module for module in modules if not _has(module)]
        detail = f"no {', '.join(missing)}" if missing else "installed"
        findings.append(Finding(what, not missing, detail, f'pip install "ettin-export[{extra}]"' if missing else ""))
    return findings


def _targets() -> list[Finding]:
    findings = []
    for target in targets():
        missing_run = [module for module in target.runtime.packages if not _has(module)]
        missing_write = [module for module in (*_GOLD, *target.writer.packages) if not _has(module)]
        extras = ([target.runtime.extra] if missing_run else []) + (["export"] if missing_write else [])
        detail = "export and run"
        if missing_write and missing_run:
            detail = f"neither export nor run: no {', '.join(dict.fromkeys(missing_write + missing_run))}"
        elif missing_write:
            detail = f"run only: to export, no {', '.join(missing_write)}"
        elif missing_run:
            detail = f"export only with --allow-unverified: to run, no {', '.join(missing_run)}"
        if target.is_compiled and not missing_write:
            detail = _engine_detail(target, missing_run)
        fix = f'pip install "ettin-export[{",".join(dict.fromkeys(extras))}]"' if extras else ""
        findings.append(Finding(f"target {target.name}", not extras, detail, fix))
    return findings
