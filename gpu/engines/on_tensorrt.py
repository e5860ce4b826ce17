"""Runs `trt` and `trt-rtx` artifacts: TensorRT's and TensorRT-RTX's engines. Needs no torch."""

from collections import OrderedDict
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import DamagedArtifact, HardwareError, UsageError
from ettin.artifacts.opened import OpenArtifact
from ettin.gpu.engines.profiles import LONGEST_MULTIPLE, Profiles, Shape
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.loading import engine_module
from ettin.runtimes.machine import gpus

if TYPE_CHECKING:  # imports cuda.bindings
    from ettin.gpu.engines.cuda import CudaGraph

# One batch computes while the next is copied and queued.
_SLOTS = 2

_GRAPHS = 32  # maximum number of CUDA graphs of a slot


class TensorRtRuntime(Runtime):
    """A deserialised engine; see `Runtime`.

    Args:
        artifact: open.
        settings: no threads, no streams, no cache.

    Raises:
        HardwareError: no GPU, another GPU or another version than the engine was compiled for.
        DamagedArtifact: the engine can't be read.
    """

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        folder, manifest = artifact.path, artifact.manifest
        settings.refuse(manifest.target, "threads", "streams", "cache_dir")
        engine = manifest.engine
        if engine is None:
            raise DamagedArtifact(f"{folder}: no 'engine' in its manifest. Export again: {manifest.command}")
        self._module = engine_module(manifest)
        self.check_machine(manifest.target, engine.arch)
        if self._module.__version__ != manifest.needs.version:
            raise HardwareError(
                f"{folder}: compiled by {manifest.needs.package} {manifest.needs.version}, installed is "
                f"{self._module.__version__}, which can't run it. Export again: {manifest.command}"
            )
        most, most_pairs = manifest.batch_limits
        if settings.batch_tokens is not None and settings.batch_tokens > most:
            raise UsageError(f"batch_tokens is {settings.batch_tokens}, the engine was compiled for at most {most}")
        limits = BatchLimits(
            concurrency=_SLOTS,
            batch_tokens=most,
            length_multiple=LONGEST_MULTIPLE,
            batch_pairs=most_pairs,
            in_parallel=False,
        )
        super().__init__(artifact, settings, limits)
        self._profiles = Profiles(engine.profiles, manifest.tokenizer.pad_token_id)
        self._logger = self._module.Logger(self._module.Logger.ERROR)
        self._runtime = self._module.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(artifact.read(manifest.entry))
        if self._engine is None:
            raise DamagedArtifact(f"{folder}: {manifest.needs.package} can't read the engine. Run: {manifest.command}")
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        for _ in range(_SLOTS):
            self._slots.put(_Slot(self._module, self._engine, self._profiles))

    @staticmethod
    def check_machine(target: str, arch: str | None) -> None:
        """Raises `HardwareError` unless this machine has a GPU, and of architecture `arch`."""
        gpu = next(iter(gpus()), None)
        if gpu is None:
            raise HardwareError(f"target '{target}' runs on a GPU, none is here")
        if arch not in (None, gpu.arch):
            raise HardwareError(
                f"the engine is for {arch}, the GPU here ({gpu.name}) is {gpu.arch}. Export for it: "
                f"--target {target} --arch {gpu.arch}"
            )

    @property
    def description(self) -> str:
        engine = self.manifest.engine
        product = "TensorRT-RTX" if self.manifest.target == "trt-rtx" else "TensorRT"
        return f"{product} {self._module.__version__}, {engine.arch if engine else ''}, {self.manifest.precision}"

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic.BF16

    def score(self, batch: Batch) -> NDArray[np.float32]:
        slot = self._slots.get()
        try:
            return slot.score(batch)
        finally:
            self._slots.put(slot)

    def _release(self) -> None:
        for _ in range(_SLOTS):
            self._slots.get().close()
        del self._engine, self._runtime


class _Slot:
    """A stream, a context for each profile, and the buffers of one inference."""

    def __init__(self, module: Any, engine: Any, profiles: Profiles) -> None:
        from ettin.gpu.engines.cuda import Stream

        self._engine, self._profiles = engine, profiles
        self._stream = Stream()
        names = ("input_ids", "cu_seqlens", "longest")
        sizes = {name: profiles.most(name) for name in names}
        self._host = {name: self._stream.pinned(sizes[name], np.int64) for name in names[:2]}
        self._logits = self._stream.pinned(sizes["cu_seqlens"] - 1, np.float32)
        self._addresses = {name: self._stream.device_bytes(8 * sizes[name]) for name in names}
        self._addresses["logits"] = self._stream.device_bytes(4 * len(self._logits))
        # Only one context runs at a time, so they share their scratch memory.
        self._strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        numbers = range(len(profiles.profiles))
        self._scratch_bytes = max(1, *(engine.get_device_memory_size_for_profile_v2(number) for number in numbers))
        self._scratch = self._stream.device_bytes(self._scratch_bytes)
        self._contexts: dict[int, Any] = {}
        self._graphs: OrderedDict[Shape, CudaGraph | None] = OrderedDict()  # None: seen once

    def score(self, batch: Batch) -> NDArray[np.float32]:
        shape = self._profiles.shape(batch)
        ids, bounds = self._host["input_ids"][: shape.tokens], self._host["cu_seqlens"][: shape.pairs + 1]
        self._profiles.fill(batch, shape, ids, bounds)
        self._launch(shape)
        self._stream.wait()
        return self._logits[: len(batch)].copy()

    def _launch(self, shape: Shape) -> None:
        """Queues copies and inference: kernel by kernel when a shape is new, as one CUDA graph when it comes again.

        TensorRT must have run a shape once before it can be recorded (its documentation, "CUDA Graphs").
        """
        is_new = shape not in self._graphs
        graph = self._graphs.setdefault(shape)
        self._graphs.move_to_end(shape)
        if is_new:
            self._queue(shape)
        else:
            if graph is None:
                graph = self._graphs[shape] = self._stream.recorded(lambda: self._queue(shape))
            graph.launch()
        if len(self._graphs) > _GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                oldest.close()

    def _queue(self, shape: Shape) -> None:
        context = self._context(shape)
        for name, host in self._host.items():
            self._stream.to_device(self._addresses[name], host[: shape.inputs[name]])
        if not context.execute_async_v3(self._stream.handle):
            raise HardwareError("TensorRT could not run the engine. Look at: nvidia-smi")
        self._stream.to_host(self._logits[: shape.pairs], self._addresses["logits"])

    def _context(self, shape: Shape) -> Any:
        if shape.profile not in self._contexts:
            context = self._engine.create_execution_context(self._strategy)
            context.set_optimization_profile_async(shape.profile, self._stream.handle)
            context.set_device_memory(self._scratch, self._scratch_bytes)
            for name, address in self._addresses.items():
                context.set_tensor_address(name, address)
            self._contexts[shape.profile] = context
        context = self._contexts[shape.profile]
        for name, count in shape.inputs.items():
            context.set_input_shape(name, (count,))
        return context

    def close(self) -> None:
        """Frees graphs, contexts and memory, in this order."""
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        self._graphs.clear()
        self._contexts.clear()
        self._stream.close()
