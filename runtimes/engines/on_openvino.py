"""Runs `openvino` artifacts on CPUs."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from queue import SimpleQueue

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ettin.artifacts.errors import HardwareError, OutputError
from ettin.artifacts.files import file_sha256
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.graph.ops import ONLY_IN_F32, SAME_WHEN_SHORT
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.batch import Batch, BatchLimits, round_up
from ettin.runtimes.engines.openvino_kernels import RAGGED_NAME, kernels
from ettin.runtimes.machine import CpuPlan, has_bf16, is_hybrid

# Kernels are made for each shape: fewer lengths, more reuse. Measured with the 17m shape in int8 on two cores, SQuAD
# pairs: 663 pairs/s with 16 and 1024, 567 with 1 and 2048, 607 with 8 and 2048.
_LENGTH_MULTIPLE = 16
_TOKENS_PER_THREAD = 1024

_OWN_KERNELS = "bf16 (own attention kernel)"

_FIRST_INFERENCE = threading.Lock()


class OpenVinoRuntime(Runtime):
    """An OpenVINO model compiled for the CPU, one stream of one thread per processor; see `Runtime`.

    `precision_hint` is OpenVINO's INFERENCE_PRECISION_HINT: "bf16" or "f32".

    The precision of the arithmetic is never OpenVINO's own choice: an fp32 artifact runs in f32; a bf16 artifact, and
    what is not int8 in an int8 artifact, runs in bf16 where the processor has it and the manifest says that bf16 was
    verified, else in f32 (`description` says which, and whether `ettin-verify` could prove something faster here).

    On a processor with AMX they run through our own attention kernel, if it was verified and can be used
    (`openvino_kernels`): batches then have no padding, and one compiled graph serves every length. Measured with the
    17m shape in int8 on two cores against OpenVINO's attention, one run: 1.5 times the pairs/s on SciFact, and a
    quarter less memory.

    Args:
        artifact: open.
        settings: all but device "cuda".

    Raises:
        HardwareError: another device was asked for.
        OutputError: the cache folder can't be made.
    """

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        manifest = artifact.manifest
        if settings.device != "cpu":
            raise HardwareError(
                f"target 'openvino' runs on the CPU, not on '{settings.device}'. Export another target: --target onnx"
            )
        plan = CpuPlan.of(settings.threads, settings.streams)
        self._kernels, self.precision_hint, self._unproven = _arithmetic(manifest, settings.allow_unverified)
        options = {
            "INFERENCE_PRECISION_HINT": self.precision_hint,
            "NUM_STREAMS": plan.streams,
            "INFERENCE_NUM_THREADS": plan.streams * plan.threads_per_stream,
        }
        if is_hybrid() and settings.threads is None:
            options["SCHEDULING_CORE_TYPE"] = "PCORE_ONLY"
        tokens = _TOKENS_PER_THREAD * plan.threads_per_stream
        limits = BatchLimits(plan.streams, tokens, 1 if self._kernels else _LENGTH_MULTIPLE)
        super().__init__(artifact, settings, limits)
        self._options = options
        self._model, key = self._read_model(artifact)
        self._cache_folder = settings.cache_dir and settings.cache_dir / f"{manifest.name}-{manifest.precision}-{key}"
        self._threshold_tokens = int(manifest.graph["block_threshold_tokens"])
        self._forms: dict[str, _Form] = {}
        self._making = threading.Lock()
        self._first_inference()

    @property
    def description(self) -> str:
        int8 = "int8 and " if self.manifest.precision == "int8" else ""
        version = ov.__version__.split("-")[0]
        more = f"; {self._unproven} is possible here, once ettin-verify has proven it" if self._unproven else ""
        return f"OpenVINO {version}, CPU, {int8}{self.arithmetic} arithmetic{more}"

    @property
    def arithmetic(self) -> str:
        return _OWN_KERNELS if self._kernels else self.precision_hint

    @property
    def unproven_arithmetic(self) -> str:
        return self._unproven

    def score(self, batch: Batch) -> NDArray[np.float32]:
        inputs = self.inputs(batch)
        with self._form(batch.longest).request() as request:
            results = request.infer(inputs, share_inputs=True, share_outputs=False)
            return np.array(results[0][:, 0], np.float32)

    def inputs(self, batch: Batch) -> list[NDArray[np.int64]]:
        """What the graph takes: padded ids and mask, or ids laid end to end and where each pair begins."""
        return list(batch.laid_out(_LENGTH_MULTIPLE) if self._kernels else batch.padded(_LENGTH_MULTIPLE))

    def _first_inference(self) -> None:
        """One inference on one thread, before any other thread may run one.

        OpenVINO's Python bindings (seen with 2026.4.1) set up their NumPy interface at the first array that they are
        given, under a C++ guard and the interpreter lock: two threads that do so at once wait for each other for ever.
        """
        one = Batch.of([np.ones(1, np.int32)], self.manifest.tokenizer.pad_token_id)
        with _FIRST_INFERENCE:
            self.score(one)

    def _form(self, longest: int) -> "_Form":
        """The compiled model for batches whose longest pair has this many tokens; compiled when it is first needed."""
        name = self._form_name(longest)
        with self._making:
            if name not in self._forms:
                with _cache(self._cache_folder and self._cache_folder / name) as cached:
                    compiled = self.core().compile_model(self.model_for(longest), "CPU", self._options | cached)
                self._forms[name] = _Form(compiled, self.limits.concurrency)
            return self._forms[name]

    def _form_name(self, longest: int) -> str:
        if self._kernels:
            return "ragged"
        return "short" if round_up(longest, _LENGTH_MULTIPLE) <= self._threshold_tokens else "long"

    def model_for(self, longest: int) -> ov.Model:
        """The graph that scores batches whose longest pair has this many tokens, a copy."""
        form = self._form_name(longest)
        useless = () if self.precision_hint == "f32" else (ONLY_IN_F32,)
        return _without(self._model, (*useless, SAME_WHEN_SHORT) if form == "short" else useless)

    def _read_model(self, artifact: OpenArtifact) -> tuple[ov.Model, str]:
        """The graph, and a key over what it is made of.

        All of it is in memory, none of it mapped: who truncates or replaces a file changes nothing that is compiled
        now or later. OpenVINO keeps the tensor of weights as long as anything uses them.
        """
        entry = PurePosixPath(self.manifest.entry)
        graph = artifact.read(str(entry.with_name(RAGGED_NAME) if self._kernels else entry))
        weights_name = str(entry.with_suffix(".bin"))
        weights = ov.Tensor(ov.Type.u8, ov.Shape([artifact.size_bytes(weights_name)]))
        artifact.read_into(weights_name, memoryview(weights.data))
        digest = hashlib.sha256(graph + artifact.sha256(weights_name).encode()).hexdigest()
        return self.core().read_model(graph.decode(), weights), digest[:16]

    def core(self) -> ov.Core:
        """What reads and compiles the graph: it knows our operation, where that is used."""
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})  # a mapped file that is truncated ends the process
        if self._kernels:
            core.add_extension(str(self._kernels))
        return core

    def _release(self) -> None:
        self._forms.clear()
        del self._model


class _Form:
    """A compiled model with a request for each stream."""

    def __init__(self, compiled: ov.CompiledModel, streams: int) -> None:
        self._requests: SimpleQueue[ov.InferRequest] = SimpleQueue()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())

    @contextmanager
    def request(self) -> Iterator[ov.InferRequest]:
        request = self._requests.get()
        try:
            yield request
        finally:
            self._requests.put(request)


def _without(model: ov.Model, names: tuple[str, ...]) -> ov.Model:
    """A copy of the graph without the nodes whose names begin with one of `names`.

    Measured with the 17m shape in int8 on two cores with AMX, without what serves blocks (gathers, reshapes and tables
    that change nothing in one block): 5 to 8 % more SQuAD pairs/s, 3 to 6 % more of SciFact.
    """
    model = model.clone()
    for node in model.get_ordered_ops():
        if node.get_friendly_name().startswith(names):
            node.output(0).replace(node.input_value(0))
    model.validate_nodes_and_infer_types()
    return model


def _arithmetic(manifest: Manifest, allow_unverified: bool) -> tuple[Path | None, str, str]:
    """Our kernels if they run, OpenVINO's precision hint, and what would be faster here but was not proven (or "")."""
    if manifest.precision == "fp32" or not has_bf16():
        return None, "f32", ""
    library = kernels() if manifest.graph.get("ragged") else None
    possible = [*([_OWN_KERNELS] if library else []), "bf16", "f32"]  # best first
    proven = possible if allow_unverified else [each for each in possible if each in manifest.parity.arithmetic]
    chosen = proven[0] if proven else "f32"
    unproven = possible[0] if possible[0] != chosen else ""
    return library if chosen == _OWN_KERNELS else None, "f32" if chosen == "f32" else "bf16", unproven


@contextmanager
def _cache(folder: Path | None) -> Iterator[dict[str, str]]:
    """Options that make OpenVINO keep what it compiles within, or take it from there.

    Args:
        folder: one for each form of each graph and weights: none is ever taken for another, and what is kept stays
            of use when only the manifest is rewritten; None: nothing is kept. OpenVINO notices a truncated file but
            not changed bytes (2026.4.1), so each has its checksum beside it and is dropped if it does not match.
    """
    if folder is None:
        yield {}
        return
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for blob, checksum in _cached(folder):
            if not checksum.exists() or checksum.read_text(encoding="ascii") != file_sha256(blob):
                blob.unlink()
                checksum.unlink(missing_ok=True)
    yield {"CACHE_DIR": str(folder)}
    with _writing(folder):
        for blob, checksum in _cached(folder):
            if not checksum.exists() or checksum.stat().st_mtime_ns < blob.stat().st_mtime_ns:
                checksum.write_text(file_sha256(blob), encoding="ascii")


def _cached(folder: Path) -> list[tuple[Path, Path]]:
    return [(blob, blob.with_suffix(".sha256")) for blob in folder.glob("*.blob")]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: can't be written ({error.strerror}). Choose another cache_dir") from None
