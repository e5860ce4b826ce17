"""ONNX → TensorRT engine, with the builder of TensorRT or of TensorRT-RTX: they share their Python API."""

import importlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ettin.artifacts.errors import BuildError, HardwareError, MissingDependency, UsageError
from ettin.artifacts.targets import target_named
from ettin.artifacts.writing import write_file
from ettin.export.options import BuildOptions
from ettin.gpu.engines.profiles import Profile
from ettin.runtimes.machine import Gpu, gpus

_PRODUCTS = {"trt": "TensorRT", "trt-rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class Built:
    """A compiled engine."""

    engine: bytes
    fused_attentions: int  # attentions in one kernel, as the builder lists the layers of one profile


def builder_module(target: str) -> Any:
    """The module that builds `target`."""
    runtime = target_named(target).runtime
    module = runtime.packages[0]
    try:
        return importlib.import_module(module)
    except ImportError:  # absent, or TensorRT's shell on PyPI without NVIDIA's libnvinfer
        raise MissingDependency(f"target '{target}'", module.replace("_", "-"), runtime.extra) from None


def check_options(target: str, options: BuildOptions) -> None:
    """Refuses options with which this machine can't build `target`."""
    if options.timing_cache is not None and target == "trt-rtx":
        raise UsageError("--timing-cache: TensorRT-RTX times no kernels when it builds. Leave it out")
    if not options.kit:
        try:
            builder_module(target)
        except MissingDependency as error:
            if target == "trt" and not gpus():
                raise HardwareError(
                    f"{error}. There is no GPU here either; a build kit needs neither: --target trt --arch sm_86 "
                    "--build-kit"
                ) from None
            raise
        checked_arch(target, options.arch, gpus())
    elif target != "trt":
        raise UsageError(f"--build-kit is for --target trt, not for '{target}'")
    elif options.arch in (None, "native"):
        raise UsageError("--build-kit is for another machine: name its GPU, such as --arch sm_90")
    else:
        _check_name(str(options.arch))


def _check_name(arch: str) -> None:
    if not re.fullmatch(r"sm_\d{2,3}", arch):
        raise UsageError(f"--arch is '{arch}', expected native or sm_ and a compute capability: sm_86")


def checked_arch(target: str, arch: str | None, present: Sequence[Gpu]) -> str:
    """The GPU architecture to build for: `arch`, or for None and "native" that of the GPUs that are present.

    Raises:
        UsageError: not an architecture.
        HardwareError: none was named and there is no GPU, or this machine can't build for the one that was named.
    """
    native = present[0].arch if present else None
    if arch is None or arch == "native":
        if native is None:
            kit = " --build-kit" if target == "trt" else ""
            raise HardwareError(f"no GPU here to build for. Name one: --target {target} --arch sm_86{kit}")
        return native
    _check_name(arch)
    if arch == native:
        return arch
    here = f"the GPU here is {native}" if native else "no GPU is here"
    if target == "trt":
        raise HardwareError(
            f"TensorRT builds only for a GPU in the machine: asked for {arch}, {here}. Build there, or write a kit "
            f"that builds there: --target trt --arch {arch} --build-kit"
        )
    capabilities = builder_module(target).ComputeCapability.__members__
    ahead_of_time = [f"sm_{name[2:]}" for name in capabilities if name.startswith("SM")]
    if arch not in ahead_of_time:
        raise HardwareError(
            f"TensorRT-RTX builds ahead of time for {', '.join(ahead_of_time)}, not for {arch}, and {here}. "
            f"Choose another target: --target trt --arch {arch}"
        )
    return arch


def build(target: str, onnx: Path, profiles: Sequence[Profile], arch: str, options: BuildOptions) -> Built:
    """Compiles a strongly typed ONNX file: its types are the engine's types. A terminal shows a progress bar.

    Raises:
        BuildError: the builder refused the graph or the settings; its last error is in the message.
    """
    module = builder_module(target)
    product, logger = f"{_PRODUCTS[target]} {module.__version__}", _logger(module)
    builder = module.Builder(logger)
    # TensorRT 11 has only strongly typed networks and may drop the flag.
    flags = module.NetworkDefinitionCreationFlag.__members__
    network = builder.create_network(1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0)
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise BuildError(f"{product} can't read {onnx.name}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if target == "trt-rtx" and arch not in {gpu.arch for gpu in gpus()}:
        config.num_compute_capabilities = 1
        config.set_compute_capability(module.ComputeCapability.__members__[f"SM{arch[3:]}"], 0)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape.min, shape.opt, shape.max)
        config.add_optimization_profile(profile)
    cache = _timing_cache(config, options.timing_cache)
    with tqdm(desc=f"{_PRODUCTS[target]} {arch}", unit="steps", disable=None, leave=False) as bar:
        config.progress_monitor = _monitor(module, bar)
        serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise BuildError(f"{product} can't build for {arch}: {logger.last_error}")
    if options.timing_cache is not None:
        write_file(options.timing_cache, bytes(cache.serialize()))
    return Built(bytes(serialised), sum("_mha_" in layer for layer in logger.layers) // len(profiles))


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, False):
        raise BuildError(f"{path}: not a timing cache of this builder and GPU. Delete it, or name another")
    return cache


def _logger(module: Any) -> Any:
    """Keeps the last error (the first say that there is no GPU, where that is so) and the listing of the layers."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.last_error = "no message"
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.last_error = message.strip()
            for line in message.splitlines() if "LayerType:" in message else ():
                layer = re.match(r"(?:Layer\(.*\): |Name: )(\S+?),? LayerType", line)
                if layer:
                    self.layers.append(layer[1])

    return Logger()


def _monitor(module: Any, bar: "tqdm[Any]") -> Any:
    """Shows the builder's own phases. The builder calls it from several threads."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                bar.total = (bar.total or 0) + steps
                bar.set_postfix_str(name[:40])

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                bar.update()
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
