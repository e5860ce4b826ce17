"""Runs `onnx` artifacts with ONNX Runtime."""

import os
from pathlib import PurePosixPath

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import DamagedArtifact, HardwareError
from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.batch import Batch, BatchLimits
from ettin.runtimes.machine import CpuPlan

# Small batches stay in the caches. Measured with the 17m shape in int8 on two cores, SQuAD pairs, in pairs/s: 278 with
# 512 tokens a thread in two streams, 212 with 2048; one stream of two threads: 209 and 222.
_CPU_TOKENS_PER_THREAD = 512


class OnnxRuntime(Runtime):
    """An ONNX Runtime session on a CPU; see `Runtime`. A subclass for a GPU replaces what is said of the device.

    Args:
        artifact: open.
        settings: no cache.

    Raises:
        HardwareError: the provider is not in this build of ONNX Runtime, or found no device.
    """

    provider = "CPUExecutionProvider"
    memory = "cpu"  # where ONNX Runtime keeps inputs and logits
    refused: tuple[str, ...] = ("cache_dir",)  # settings that it does not have
    fix = 'pip install "ettin-export[onnx]"'  # what installs an ONNX Runtime with the provider

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        settings.refuse("onnx", *self.refused)
        plan = self.plan(settings)
        options = ort.SessionOptions()
        options.intra_op_num_threads = plan.threads_per_stream
        options.log_severity_level = 3  # errors only: warnings about node placement are not for users
        options.enable_mem_pattern = False  # a rerank's batches have many shapes, and a plan is kept for each of them
        session = _session(artifact, options, self.providers(options, settings))
        if session.get_providers()[0] != self.provider:
            raise HardwareError(
                f"device '{settings.device}': ONNX Runtime could not start {self.provider}. Run: ettin-export --doctor"
            )
        self._session: ort.InferenceSession | None = session
        self._run_options = self.run_options()
        self._packed = any(tensor.name == "cu_seqlens" for tensor in artifact.manifest.interface.inputs)
        super().__init__(artifact, settings, self.batch_limits(plan))

    def providers(self, options: ort.SessionOptions, settings: Settings) -> list[str] | None:
        """Names of the session's providers; None if `options` have them by now.

        Raises:
            HardwareError: this build of ONNX Runtime does not have it.
        """
        available = ort.get_available_providers()
        if self.provider not in available:
            raise HardwareError(
                f"device '{settings.device}' needs {self.provider}, this ONNX Runtime has {', '.join(available)}. "
                f"Run: {self.fix}"
            )
        return [self.provider]

    def plan(self, settings: Settings) -> CpuPlan:
        """How CPU threads are divided."""
        return CpuPlan.of(settings.threads, settings.streams)

    def batch_limits(self, plan: CpuPlan) -> BatchLimits:
        """The batches that the device takes."""
        return BatchLimits(concurrency=plan.streams, batch_tokens=_CPU_TOKENS_PER_THREAD * plan.threads_per_stream)

    def run_options(self) -> ort.RunOptions:
        """What each run is told.

        With its arena, one int8 pair of 7999 tokens (17m) takes 109 MiB, with malloc 299. The arena would keep the
        memory of the largest batch, so each run gives unused memory back.
        """
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    @property
    def description(self) -> str:
        return f"ONNX Runtime {ort.__version__}, {self.provider}, {self.manifest.precision}"

    @property
    def arithmetic(self) -> Arithmetic:
        return {"fp16": Arithmetic.F16, "bf16": Arithmetic.BF16}.get(self.manifest.precision, Arithmetic.F32)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        assert self._session is not None  # noqa: S101 (predict refuses a closed runtime)
        if self._packed:
            feeds = batch.packed()
        else:
            feeds = dict(zip(("input_ids", "attention_mask"), batch.padded(), strict=True))
        # Bound, so that nothing is copied but the inputs to the device and the logits back.
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self.memory, 0))
        binding.bind_output("logits", self.memory)
        self._session.run_with_iobinding(binding, self._run_options)
        logits = binding.get_outputs()[0].numpy()
        return np.asarray(logits[:, 0], np.float32)

    def _release(self) -> None:
        self._session = None


def _session(artifact: OpenArtifact, options: ort.SessionOptions, providers: list[str] | None) -> ort.InferenceSession:
    """A session made of checked bytes: ONNX Runtime opens no file."""
    manifest = artifact.manifest
    # A graph may name a file of weights. The one that the manifest lists is handed over as bytes; any other would be
    # looked for in the current folder, unless another folder is named: one that can't exist.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    data_name = f"{manifest.entry}_data"
    if any(file.path == data_name for file in manifest.files):
        data = artifact.read(data_name)
        options.add_external_initializers_from_files_in_memory([PurePosixPath(data_name).name], [data], [len(data)])
    # ONNX Runtime's Python interface has a fallback to the CPU of its own, which says so on stdout.
    session = ort.InferenceSession(artifact.read(manifest.entry), options, providers=providers, enable_fallback=0)
    session._model_bytes = None  # kept for that fallback, too
    names = [tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())]
    if names != [tensor.name for tensor in (*manifest.interface.inputs, *manifest.interface.outputs)]:
        raise DamagedArtifact(
            f"{artifact.path / manifest.entry}: inputs and outputs are {', '.join(names)}, not those of its manifest. "
            f"Export again: {manifest.command}"
        )
    return session
