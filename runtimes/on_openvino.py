"""Runs `openvino` artifacts on CPUs."""

import threading
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes.base import Limits, Runtime
from ettin.runtimes.batch import Batch
from ettin.runtimes.cpu import available_cpus, has_bf16

# Kernels are made for each shape: fewer lengths, more reuse. Measured with the 17m shape in int8 on two cores, SQuAD
# pairs: 663 pairs/s with 16 and 1024, 567 with 1 and 2048, 607 with 8 and 2048.
_LENGTH_MULTIPLE = 16
_BATCH_TOKENS = 1024

_FIRST_INFERENCE = threading.Lock()


class OpenVinoRuntime(Runtime):
    """An OpenVINO model compiled for the CPU, one stream of one thread per processor; see `Runtime`.

    The precision of the arithmetic is never OpenVINO's own choice: an fp32 artifact runs in f32; a bf16 artifact, and
    what is not int8 in an int8 artifact, runs in bf16 where the processor has it and the manifest says that bf16 was
    verified, else in f32 (`description` says which).

    Args:
        folder: the artifact.
        manifest: its manifest.
        device: must be "cpu".
        threads: CPU threads; None: all available.
        max_length: see `Runtime`.

    Raises:
        HardwareError: another device was asked for.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, device: str, threads: int | None, max_length: int | None
    ) -> None:
        if device != "cpu":
            raise HardwareError(
                f"target 'openvino' runs on the CPU, not on '{device}'. Export another target: --target onnx"
            )
        threads = threads or available_cpus()
        self._hint = _arithmetic(manifest)
        core = ov.Core()
        model = core.read_model(folder / manifest.entry)
        self._compiled = core.compile_model(
            model,
            "CPU",
            {"INFERENCE_PRECISION_HINT": self._hint, "NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads},
        )
        self._requests: SimpleQueue[ov.InferRequest] = SimpleQueue()
        for _ in range(threads):
            self._requests.put(self._compiled.create_infer_request())
        self._first_inference()
        super().__init__(
            folder,
            manifest,
            Limits(concurrency=threads, batch_tokens=_BATCH_TOKENS, length_multiple=_LENGTH_MULTIPLE),
            max_length,
        )

    @property
    def description(self) -> str:
        int8 = "int8 and " if self.manifest.precision == "int8" else ""
        return f"OpenVINO {ov.__version__.split('-')[0]}, CPU, {int8}{self._hint} arithmetic"

    @property
    def arithmetic(self) -> str:
        return self._hint

    def score(self, batch: Batch) -> NDArray[np.float32]:
        input_ids, attention_mask = batch.padded(self.limits.length_multiple)
        request = self._requests.get()
        try:
            results = request.infer([input_ids, attention_mask], share_inputs=True, share_outputs=False)
            return np.array(results[0][:, 0], np.float32)
        finally:
            self._requests.put(request)

    def _first_inference(self) -> None:
        """One inference on one thread, before any other thread may run one.

        OpenVINO's Python bindings (seen with 2026.4.1) set up their NumPy interface at the first array that they are
        given, under a C++ guard and the interpreter lock: two threads that do so at once wait for each other for ever.
        """
        one = np.ones((1, _LENGTH_MULTIPLE), np.int64)
        with _FIRST_INFERENCE:
            request = self._requests.get()
            request.infer([one, one], share_inputs=True)
            self._requests.put(request)

    def _release(self) -> None:
        del self._compiled, self._requests


def _arithmetic(manifest: Manifest) -> str:
    if manifest.precision == "fp32" or not has_bf16():
        return "f32"
    return "bf16" if manifest.parity.status == "unverified" or "bf16" in manifest.parity.arithmetic else "f32"
