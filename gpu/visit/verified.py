"""Part (e): artifacts on the device, as ettin-verify runs them, and what TensorRT's builders say to this GPU."""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ettin.artifacts.errors import MissingDependency
from ettin.artifacts.manifest import Manifest
from ettin.export.options import BuildOptions
from ettin.gpu.targets.tensorrt_builder import build, builder_module, checked_arch
from ettin.gpu.visit.report import Report, Task, reason_of
from ettin.runtimes.machine import gpus
from ettin.runtimes.verify import adopt_engine, verify

_BUILDERS = ("trt", "trt-rtx")


def run(task: Task, report: Report) -> None:
    """Verifies every artifact in the folder, and builds the engines of build kits where a builder is installed.

    A row with a target is one of a path that ran: it failed unless it says that it passed.
    """
    if task.artifacts is None:
        return
    for folder in sorted(path.parent for path in task.artifacts.rglob("manifest.json")):
        name, manifest = folder.relative_to(task.artifacts).as_posix(), Manifest.read(folder)
        if not manifest.is_build_kit:
            device = task.device if manifest.needs.device == "any" else manifest.needs.device
            about = {"target": manifest.target, "device": device, "precision": manifest.precision, "passed": False}
            _try(report, name, about, partial(_verified, folder, device))
            continue
        for target in _BUILDERS:
            about = {"target": target, "precision": manifest.precision, "passed": False} if target == "trt" else {}
            _try(report, f"{name}, {target}", about, partial(_built, folder, target, task.device))


def _try(report: Report, name: str, about: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
    """Does it, and keeps what it is about where it fails or never ends. A missing engine is no failure."""

    def whole() -> dict[str, Any]:
        report.piece(name, {**about, "unfinished": True})  # what stays if the engine kills the process
        try:
            return {**about, **work()}
        except MissingDependency as error:
            return {"problem": str(error)}
        except Exception as error:
            return {**about, "problem": reason_of(error)}

    report.attempt(name, whole)


def _verified(folder: Path, device: str) -> dict[str, Any]:
    found = verify(folder, device=device)
    return {"passed": found.ok, "runtime": found.runtime, "summary": found.summary, "rule": found.parity.rule}


def _built(kit: Path, target: str, device: str) -> dict[str, Any]:
    """Builds the kit's graph for the GPU that is here.

    TensorRT's engine is verified. A kit is one of TensorRT, so of TensorRT-RTX's engine it is tried whether it loads.
    """
    module: Any = builder_module(target)
    manifest, arch = Manifest.read(kit), checked_arch(target, None, gpus())
    assert manifest.engine is not None  # noqa: S101 (a build kit has one)
    built = build(target, kit / "engine" / "model.onnx", manifest.engine.profiles, arch, BuildOptions())
    about = {"arch": arch, "engine_bytes": len(built.engine), "fused_attentions": built.fused_attentions}
    if target == "trt":
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(shutil.copytree(kit, Path(scratch) / "kit"))
            (folder / manifest.entry).write_bytes(built.engine)
            adopt_engine(folder)
            return {**about, **_verified(folder, device)}
    logger = module.Logger(module.Logger.WARNING)
    engine = module.Runtime(logger).deserialize_cuda_engine(built.engine)
    return {**about, "loads": engine is not None and engine.create_execution_context() is not None}
