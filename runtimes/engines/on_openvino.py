"""Runs `openvino` artifacts on CPUs."""

import hashlib
import threading
from pathlib import PurePosixPath
from queue import SimpleQueue

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.graph import ModelShape
from ettin.graph.ops import ONLY_IN_F32, SAME_WHEN_SHORT
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.batch import Batch, BatchLimits, round_up
from ettin.runtimes.engines.openvino_cache import cached_options
from ettin.runtimes.engines.openvino_fusion import use_kernels, widen_products, without
from ettin.runtimes.engines.openvino_kernels import RAGGED_NAME, Variant, compiled, variant
from ettin.runtimes.engines.openvino_tokens import TokenTables
from ettin.runtimes.machine import CpuPlan, has_bf16, is_arm, is_hybrid, uses_all_cpus

# OpenVINO compiles kernels for each shape, so fewer lengths mean more reuse. Measured with the 17m shape in int8 on two
# cores with AMX, SQuAD pairs, padded graph: 663 pairs/s with 16 and 1024, 567 with 1 and 2048, 607 with 8 and 2048.
_LENGTH_MULTIPLE = 16
_TOKENS_PER_THREAD = 1024
# Each call of the engine costs about 0.5 ms, which counts where a batch takes few. Two cores with AVX-512, SQuAD pairs,
# 17m shape in int8, ragged graph: 402 pairs/s with 1024, 412 with 1536, 418 with 2048. Others wait longer, too.
_SMALL_MODEL_TOKENS_PER_THREAD = 1536
_SMALL_MODEL_PARAMETERS = 50_000_000

_FIRST_INFERENCE = threading.Lock()


class OpenVinoRuntime(Runtime):
    """An OpenVINO model compiled for the CPU, one stream of one thread per processor; see `Runtime`.

    `precision_hint` is OpenVINO's INFERENCE_PRECISION_HINT: "bf16" or "f32".

    OpenVINO never chooses the arithmetic: an fp32 artifact runs in f32. A bf16 artifact runs in bf16 where the
    processor has it and the manifest says that bf16 was verified, else in f32. What is not int8 in an int8 artifact
    does so, too, but with our attention kernel in bf16 only on AMX, or where f32 was not verified.

    Attention runs through our own kernel, if it was verified and can be used (`openvino_kernels`): batches then have no
    padding, and one compiled graph serves every length. Measured with the 17m shape in int8 on two cores with AMX
    against OpenVINO's attention, one run: 1.5 times the pairs/s on SciFact, and a quarter less memory.

    Args:
        artifact: open.
        settings: all of them.

    Raises:
        OutputError: the cache folder can't be made.
    """

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        manifest = artifact.manifest
        plan = CpuPlan.of(settings.threads, settings.streams)
        threads = plan.streams * plan.threads_per_stream
        self._kernel, self._arithmetic, self._unproven = _chosen(manifest, settings.allow_unverified)
        self.precision_hint = _floats(self._arithmetic)
        self._options = {
            "INFERENCE_PRECISION_HINT": self.precision_hint,
            "NUM_STREAMS": plan.streams,
            "INFERENCE_NUM_THREADS": threads,
            # OpenVINO pins threads to the first cores, so processes that share a machine would share these cores.
            "ENABLE_CPU_PINNING": uses_all_cpus(threads, performance_only=plan.streams == 1),
        }
        if is_hybrid() and settings.threads is None:
            cores = "PCORE_ONLY" if plan.streams == 1 else "ANY_CORE"
            self._options |= {"SCHEDULING_CORE_TYPE": cores, "ENABLE_HYPER_THREADING": False}
        num_parameters = ModelShape.from_json(manifest.source.shape).num_parameters
        self._is_small = self._kernel is not None and num_parameters < _SMALL_MODEL_PARAMETERS
        tokens = _SMALL_MODEL_TOKENS_PER_THREAD if self._is_small else _TOKENS_PER_THREAD
        multiple = 1 if self._kernel else _LENGTH_MULTIPLE
        super().__init__(artifact, settings, BatchLimits(plan.streams, tokens * plan.threads_per_stream, multiple))
        self._model, key = self._read_model(artifact)
        self._cache_folder = settings.cache_dir and settings.cache_dir / f"{manifest.name}-{manifest.precision}-{key}"
        self._threshold_tokens = manifest.graph.block_threshold_tokens
        self._forms: dict[str, SimpleQueue[ov.InferRequest]] = {}  # a request for each stream
        self._tables: TokenTables | None = None  # of small models
        self._compiling = threading.Lock()
        self._first_inference()

    @property
    def description(self) -> str:
        int8 = "int8 and " if self.manifest.precision == "int8" else ""
        version = ov.__version__.split("-")[0]
        text = f"OpenVINO {version}, CPU, {int8}{self._arithmetic.description} arithmetic"
        if self._unproven is None:
            return text
        return f"{text}; {self._unproven.description} is possible here, once ettin-verify has proven it"

    @property
    def arithmetic(self) -> Arithmetic:
        return self._arithmetic

    @property
    def unproven_arithmetic(self) -> Arithmetic | None:
        return self._unproven

    def score(self, batch: Batch) -> NDArray[np.float32]:
        requests = self._requests(batch.longest)
        request = requests.get()
        try:
            inputs = self.inputs(batch)
            if self._options["INFERENCE_NUM_THREADS"] == 1:
                # `infer` of OpenVINO 2026.4.1 hides there what goes wrong in a node. Elsewhere it takes 0.2 ms less.
                request.start_async(inputs, share_inputs=True)
                request.wait()
            else:
                request.infer(inputs, share_inputs=True)
            return np.array(request.get_output_tensor(0).data[:, 0], np.float32)
        except RuntimeError as error:  # its lines say where, and the last one why
            raise RuntimeError(str(error).strip().split("\n")[-1]) from error
        finally:
            requests.put(request)

    def inputs(self, batch: Batch) -> list[NDArray[np.int64] | ov.Tensor]:
        """What the graph takes: padded ids and mask, or ids laid end to end, where each pair begins, and tables."""
        if not self._kernel:
            return list(batch.padded(_LENGTH_MULTIPLE))
        ids, cu_seqlens = batch.laid_out(_LENGTH_MULTIPLE)
        if self._tables is None:
            return [ids, cu_seqlens]
        return [self._tables.rows(ids), cu_seqlens, *self._tables.tensors]

    def model_for(self, longest: int) -> ov.Model:
        """A copy of the graph that scores batches whose longest pair has this many tokens."""
        names = [] if self.precision_hint == "f32" else [ONLY_IN_F32]
        if self._form(longest) == "short":
            names.append(SAME_WHEN_SHORT)
        model = without(self._model, tuple(names))
        if self._kernel:
            use_kernels(model, self._kernel, self.precision_hint)
        if self.manifest.precision == "int8" and is_arm():
            widen_products(model)
        if self._is_small and self._tables is None:
            self._tables = TokenTables.of(model, self.core(), self._options)
        if self._tables:
            self._tables.use(model)
        return model

    def core(self) -> ov.Core:
        """The OpenVINO core that reads and compiles the graph, with our operation where it is used."""
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})  # a mapped file that is truncated ends the process
        if self._kernel:
            core.add_extension(str(compiled()))
        return core

    def _first_inference(self) -> None:
        """One inference on one thread, before any other thread may run one.

        OpenVINO's Python bindings (seen with 2026.4.1) set up their NumPy interface at the first array that they are
        given, under a C++ guard and the interpreter lock: two threads that do so at once deadlock.
        """
        one = Batch.of([np.ones(1, np.int32)], self.manifest.tokenizer.pad_token_id)
        with _FIRST_INFERENCE:
            self.score(one)

    def _form(self, longest: int) -> str:
        if self._kernel:
            return "ragged"
        return "short" if round_up(longest, _LENGTH_MULTIPLE) <= self._threshold_tokens else "long"

    def _requests(self, longest: int) -> "SimpleQueue[ov.InferRequest]":
        """The free requests of the form for batches of this length, which is compiled when it is first needed."""
        form = self._form(longest)
        with self._compiling:
            if form not in self._forms:
                with cached_options(self._cache_folder and self._cache_folder / form) as cached:
                    compiled = self.core().compile_model(self.model_for(longest), "CPU", self._options | cached)
                requests: SimpleQueue[ov.InferRequest] = SimpleQueue()
                for _ in range(self.limits.concurrency):
                    requests.put(compiled.create_infer_request())
                self._forms[form] = requests
            return self._forms[form]

    def _read_model(self, artifact: OpenArtifact) -> tuple[ov.Model, str]:
        """The graph, and a key over graph and weights. All is in memory: no later change of a file has an effect."""
        entry = PurePosixPath(self.manifest.entry)
        graph = artifact.read(str(entry.with_name(RAGGED_NAME) if self._kernel else entry))
        listed = artifact.listed(str(entry.with_suffix(".bin")))
        weights = ov.Tensor(ov.Type.u8, ov.Shape([listed.size_bytes]))  # OpenVINO keeps it as long as it is used
        artifact.read_into(listed.path, memoryview(weights.data))
        key = hashlib.sha256(graph + listed.sha256.encode()).hexdigest()[:16]
        return self.core().read_model(graph.decode(), weights), key

    def _release(self) -> None:
        self._forms.clear()
        self._tables = None
        del self._model


# The precision of the attention kernel's products, the best arithmetic first; None: OpenVINO's own attention.
#
# Between int8 products lies f32, also where the processor has bf16: so our kernel does the same without AMX everywhere.
# bf16 is 3 to 4 % faster with AVX-512 (17m and 150m shapes, Zen 4). But with trained weights in the 17m shape, on 1,600
# pairs of SciFact training queries, the standard deviation of the error is 0.042 with it and 0.036 without.
_PRODUCTS = {
    Arithmetic.F32_INT8_ATTENTION: "int8",
    Arithmetic.BF16_OWN_ATTENTION: "bf16",
    Arithmetic.BF16: None,
    Arithmetic.F32_OWN_ATTENTION: "f32",
    Arithmetic.F32: None,
}


def _floats(arithmetic: Arithmetic) -> str:
    return arithmetic.value.partition("-")[0]


def _chosen(manifest: Manifest, allow_unverified: bool) -> tuple[Variant | None, Arithmetic, Arithmetic | None]:
    """Our attention kernel if it is used, the arithmetic, and what would be faster here but was not proven."""
    possible: dict[Arithmetic, Variant | None] = {}
    head_dim = ModelShape.from_json(manifest.source.shape).head_dim
    for arithmetic, products in _PRODUCTS.items():
        floats = _floats(arithmetic)
        if floats == "bf16" and (manifest.precision == "fp32" or not has_bf16()):
            continue
        if products is None:
            possible[arithmetic] = None
        elif manifest.graph.ragged and (products != "int8" or manifest.precision == "int8"):
            kernel = variant(products, floats, head_dim)
            if kernel is not None:
                possible[arithmetic] = kernel
    best_first = list(possible)
    own = possible.get(Arithmetic.BF16_OWN_ATTENTION)
    if own is not None and own.name == "bf16_amx":  # as fast as products of int8, and more exact
        best_first.sort(key=lambda kind: kind is not Arithmetic.BF16_OWN_ATTENTION)
    proven = best_first if allow_unverified else [kind for kind in best_first if kind in manifest.parity.arithmetic]
    chosen = proven[0] if proven else Arithmetic.F32
    return possible[chosen], chosen, None if best_first[0] is chosen else best_first[0]
