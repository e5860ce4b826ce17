"""TensorRT targets: what can be proven without a GPU. The builder of TensorRT-RTX is real, the card is a stand-in."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from ettin.artifacts.errors import (
    BuildError,
    DamagedArtifact,
    HardwareError,
    MissingDependency,
    ShapeError,
    UnverifiedArtifact,
    UsageError,
)  # fmt: skip
from ettin.artifacts.manifest import MANIFEST_NAME, Manifest
from ettin.artifacts.metrics import score_error
from ettin.artifacts.parity import read_parity
from ettin.artifacts.tolerances import REDUCED_RATIO
from ettin.export import reports
from ettin.export.options import BuildOptions, Job, Options
from ettin.export.pipeline import Export
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import SIZES
from ettin.export.source.weights import write_random_checkpoint
from ettin.export.targets.to_onnx import packed_onnx
from ettin.export.writer import rewrite
from ettin.gpu.engines import on_tensorrt
from ettin.gpu.engines.profiles import BATCH_PAIRS, BATCH_TOKENS, Profiles, profiles
from ettin.gpu.marks import mark
from ettin.gpu.targets import tensorrt_builder
from ettin.gpu.targets.tensorrt_builder import build, checked_arch
from ettin.runtimes import load
from ettin.runtimes import machine as gpu
from ettin.runtimes.batch import Batch, BatchLimits, cut
from ettin.runtimes.machine import Gpu
from ettin.runtimes.verify import adopt_engine, record_verified, verify

CARD = Gpu("NVIDIA GeForce RTX 3090", "sm_86", "580.95.05")


@pytest.fixture(scope="module")
def typed(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("typed") / "model.onnx"
    packed_onnx(rewrite(demo), "bfloat16", path)
    return path


# The typed graph.


def test_types_are_in_the_graph(typed: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(typed), strict_mode=True)
    values = (*model.graph.value_info, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    seen: dict[str, set[str]] = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Softmax", "LayerNormalization", "Gelu"):
            kind = onnx.TensorProto.DataType.Name(types[node.output[0]])
            seen.setdefault(node.op_type, set()).add(kind)
    assert seen["Softmax"] == seen["LayerNormalization"] == seen["Gelu"] == {"FLOAT"}
    assert seen["MatMul"] == {"BFLOAT16", "FLOAT"}  # float: the head
    floats = [node for node in model.graph.node if node.op_type == "MatMul" and types[node.output[0]] == 1]
    assert len(floats) == 2 and {name for node in floats for name in node.input} >= {"head.dense", "head.score"}
    assert types["embedding"] == onnx.TensorProto.BFLOAT16 and types["head.dense"] == onnx.TensorProto.FLOAT


def test_typed_graph_is_as_exact_as_torch_in_bf16(typed: Path, demo_artifacts: dict[tuple[str, str], Path]) -> None:
    """Run by ONNX's reference evaluator: ONNX Runtime's CPU provider has no MatMul in bf16."""
    cases = [case for case in read_parity(demo_artifacts["openvino", "bf16"]) if len(case.ids) <= 130][::6]
    assert len(cases) >= 25 and max(len(case.ids) for case in cases) > 100
    evaluator = ReferenceEvaluator(str(typed))
    scores = []
    for start in range(0, len(cases), 16):
        sequences = [np.array(case.ids, np.int32) for case in cases[start : start + 16]]
        (logits,) = evaluator.run(None, Batch.of(sequences, 0).packed())
        scores += logits[:, 0].tolist()
    gold = [case.gold for case in cases]
    baseline = score_error([case.torch_bf16 or 0.0 for case in cases], gold)
    assert 0 < score_error(scores, gold).mean_abs <= REDUCED_RATIO["bf16"] * baseline.mean_abs


# Profiles.


@pytest.mark.parametrize("max_length", [64, 512, 7999])
def test_every_batch_that_the_runtime_cuts_fits_a_profile(max_length: int) -> None:
    shapes = profiles(max_length)
    limits = BatchLimits(2, BATCH_TOKENS, 64, BATCH_PAIRS)
    chooser = Profiles(shapes, 0)
    generator = np.random.default_rng(0)
    for least, most in ((1, 8), (1, max_length), (max_length - 5, max_length), (30, 40)):
        lengths = generator.integers(least, most + 1, 5000).clip(1, max_length).tolist()
        for chosen in cut(lengths, limits.batch_tokens, limits.length_multiple, limits.batch_pairs):
            batch = Batch.of([np.zeros(lengths[index], np.int32) for index in chosen], 0)
            shape = chooser.shape(batch)
            profile = shapes[shape.profile]
            for name, count in (
                ("input_ids", shape.tokens),
                ("cu_seqlens", shape.pairs + 1),
                ("longest", shape.longest),
            ):
                assert profile[name].min[0] <= count <= profile[name].max[0]
            assert shape.tokens >= len(batch.ids) and shape.pairs >= len(batch) and shape.longest >= batch.longest


def test_a_short_batch_does_not_pay_for_the_longest() -> None:
    slots = [(profile["cu_seqlens"].max[0] - 1) * profile["longest"].max[0] for profile in profiles(7999)]
    assert slots[0] < 0.2 * slots[1] and max(slots) <= 4 * BATCH_TOKENS
    assert profiles(7999)[-1]["longest"].max == (7999,) and profiles(300)[-1]["longest"].max == (300,)


# The builder of TensorRT-RTX, without a GPU.


@pytest.fixture
def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="needs the `trt-rtx` extra")


@pytest.fixture(scope="module")
def export(demo: Checkpoint) -> Export:
    """Gold is scored once for all of this file."""
    export = Export(demo, Options(max_length=512, allow_unverified=True))
    export.prepare([Job("trt", "bf16", Path("unused"))])
    return export


def building(export: Export, build: BuildOptions) -> Export:
    return replace(export, options=replace(export.options, build=build))


@pytest.fixture(scope="module")
def engine_artifact(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="needs the `trt-rtx` extra")
    output = tmp_path_factory.mktemp("rtx") / "artifact"
    assert building(export, BuildOptions(arch="sm_86")).run(Job("trt-rtx", "bf16", output)) is None
    return output


def test_engine_is_built_without_a_gpu(engine_artifact: Path, demo: Checkpoint) -> None:
    manifest = Manifest.read(engine_artifact)
    assert manifest.engine is not None and manifest.parity.status == "unverified"
    assert manifest.engine.fused_attentions == demo.shape.num_layers
    assert list(manifest.engine.profiles) == profiles(512) and manifest.engine.arch == "sm_86"
    assert (engine_artifact / manifest.entry).stat().st_size > 1 << 20
    assert {file.path for file in manifest.files} == {"engine/model.engine", "parity.jsonl", "tokenizer.json"}
    card = (engine_artifact / "README.md").read_text()
    assert "Not verified" in card
    assert manifest.experimental == bool(mark("trt-rtx")) == ("**Experimental.**" in card)


def test_unproven_engine_is_not_loaded(engine_artifact: Path) -> None:
    with pytest.raises(UnverifiedArtifact, match="Run here: ettin-verify"):
        load(engine_artifact)


def test_verifying_needs_the_gpu(engine_artifact: Path, no_gpu: None) -> None:
    pytest.importorskip("cuda.bindings", reason="needs the `trt-rtx` extra")
    with pytest.raises(HardwareError, match="runs on a GPU, none is here"):
        verify(engine_artifact)
    with pytest.raises(UsageError, match="target 'trt-rtx' does not run on device 'cpu', expected one of: cuda$"):
        load(engine_artifact, device="cpu", allow_unverified=True)
    assert Manifest.read(engine_artifact).parity.status == "unverified"


def test_without_the_flag_nothing_is_published(rtx: ModuleType, demo: Checkpoint, tmp_path: Path, no_gpu: None) -> None:
    job = Job("trt-rtx", "bf16", tmp_path / "artifact")
    export = Export(demo, Options(build=BuildOptions(arch="sm_86")))
    with pytest.raises(HardwareError, match="none is here; so its scores can't be proven here.*--allow-unverified"):
        export.check([job])
    with pytest.raises(HardwareError, match="ettin-verify"):
        export.run(job)
    assert list(tmp_path.iterdir()) == []


def test_a_timing_cache_that_rtx_has_no_use_for_is_refused_first(demo: Checkpoint, tmp_path: Path) -> None:
    """Before the reference is scored, which takes longest."""
    options = Options(build=BuildOptions("sm_89", timing_cache=tmp_path / "cache"), allow_unverified=True)
    with pytest.raises(UsageError, match="TensorRT-RTX times no kernels"):
        Export(demo, options).check([Job("trt-rtx", "bf16", tmp_path / "out")])


def test_builder_options(rtx: ModuleType, typed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = build("trt-rtx", typed, profiles(256)[:1], "sm_89", BuildOptions(workspace_mib=512))
    assert built.fused_attentions == 7
    assert capsys.readouterr().err == ""  # no bar where nobody looks
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(BuildError, match="TensorRT-RTX .* can't read broken.onnx: "):
        build("trt-rtx", broken, profiles(256)[:1], "sm_86", BuildOptions())


def test_biases_and_mean_pooling_build(rtx: ModuleType, plain: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    checkpoint = plain("biased mean")
    packed_onnx(rewrite(checkpoint), "bfloat16", tmp_path / "model.onnx")
    built = build("trt-rtx", tmp_path / "model.onnx", profiles(256)[:1], "sm_86", BuildOptions())
    assert built.fused_attentions == checkpoint.shape.num_layers


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds(rtx: ModuleType, size: str, tmp_path: Path) -> None:
    """`pytest -m slow -s -k every_size_builds` prints time, size and memory (of the process, all of it)."""
    write_random_checkpoint(tmp_path, SIZES[size].shape, 0)
    checkpoint = read_checkpoint(tmp_path, is_random=True)
    path = tmp_path / "onnx" / "model.onnx"
    packed_onnx(rewrite(checkpoint), "bfloat16", path)
    start = time.perf_counter()
    built = build("trt-rtx", path, profiles(checkpoint.max_length_tokens), "sm_86", BuildOptions())
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{size}: {seconds:.1f} s, {len(built.engine) >> 20} MiB engine, {peak} MiB peak")  # noqa: T201
    assert built.fused_attentions == checkpoint.shape.num_layers


# Which machine builds what.


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    gpu.gpus.cache_clear()
    yield
    gpu.gpus.cache_clear()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__={"NONE": 0, "CURRENT": 1, "SM86": 86}))
    monkeypatch.setattr(tensorrt_builder, "builder_module", lambda target: module)
    assert checked_arch("trt-rtx", "sm_86", []) == "sm_86"
    assert checked_arch("trt", None, [CARD]) == checked_arch("trt", "native", [CARD]) == "sm_86"
    with pytest.raises(UsageError, match="--arch is 'ampere', expected native or sm_"):
        checked_arch("trt", "ampere", [])
    with pytest.raises(HardwareError, match="no GPU here to build for. Name one: --target trt-rtx --arch sm_86"):
        checked_arch("trt-rtx", None, [])
    with pytest.raises(
        HardwareError, match="no GPU here to build for. Name one: --target trt --arch sm_86 --build-kit"
    ):
        checked_arch("trt", None, [])
    with pytest.raises(HardwareError, match="ahead of time for sm_86, not for sm_90, and no GPU is here.*--target trt"):
        checked_arch("trt-rtx", "sm_90", [])
    with pytest.raises(HardwareError, match="asked for sm_90, the GPU here is sm_86.*--build-kit"):
        checked_arch("trt", "sm_90", [CARD])


def test_doctor_says_what_can_be_built_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def detail(target: str, absent: set[str], present: list[Gpu]) -> str:
        monkeypatch.setattr(reports, "_has", lambda module: module not in absent)
        monkeypatch.setattr(reports, "gpus", lambda: present)
        found = next(finding.detail for finding in reports._targets() if finding.what == f"target {target}")
        return found.partition("; experimental")[0]

    assert detail("trt", {"tensorrt"}, []).startswith("neither build nor run: no tensorrt; a build kit can be written")
    assert detail("trt", set(), []) == "build kits only (--build-kit); to run, no GPU"
    assert detail("trt", set(), [CARD]) == "build and run: sm_86"
    assert detail("trt-rtx", set(), []) == "build ahead of time (--arch, --allow-unverified); to run, no GPU"
    assert detail("trt-rtx", {"cuda.bindings"}, [CARD]) == "build; to run, no cuda.bindings: sm_86"
    assert detail("trt-rtx", {"tensorrt_rtx"}, [CARD]) == "neither build nor run: no tensorrt_rtx"


def test_driver_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 580.95.05'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu.gpus.cache_clear()
    assert gpu.gpus() == [Gpu("NVIDIA H100 80GB HBM3", "sm_90", "580.95.05")]
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    gpu.gpus.cache_clear()
    with pytest.raises(HardwareError, match="driver does not answer: nvidia-smi says 'Failed to initialize NVML"):
        gpu.gpus()


# The build kit.


@pytest.fixture(scope="module")
def kit_template(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kit") / "artifact"
    options = BuildOptions(arch="sm_90", kit=True, workspace_mib=99)
    assert building(export, options).run(Job("trt", "bf16", output)) is None
    return output


@pytest.fixture
def kit(kit_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kit_template, tmp_path / "artifact"))


def test_kit_script_agrees_with_the_graph(kit: Path) -> None:
    script = (kit / "engine" / "build.sh").read_text()
    inputs = {value.name for value in onnx.load(kit / "engine" / "model.onnx").graph.input}
    ranges = re.findall(r"--(min|opt|max)Shapes=(\S+)", script)
    assert len(ranges) == 3 * len(profiles(512)) == 3 * len(re.findall(r"--profile=(\d)", script))
    for _, spec in ranges:
        assert {part.split(":")[0] for part in spec.split(",")} == inputs
    assert "sm_90" in script and "--memPoolSize=workspace:99M" in script


# Options of trtexec that each of these releases reads: `samples/common/sampleOptions.cpp` in github.com/NVIDIA/TensorRT
# at release/10.0, 10.14, 10.16, 11.0 and 11.1. In 11, --stronglyTyped is "[Deprecated] … This flag is a no-op".
TRTEXEC = {
    "--help", "--onnx", "--saveEngine", "--profilingVerbosity", "--timingCacheFile", "--skipInference", "--memPoolSize",
    "--profile", "--minShapes", "--optShapes", "--maxShapes", "--stronglyTyped",
}  # fmt: skip


@pytest.mark.parametrize("help_lists", ["--stronglyTyped", "no such option"])
def test_kit_script_runs(kit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, help_lists: str) -> None:
    """With a stand-in of trtexec that checks that each word is one option and each file is there."""
    program, words = tmp_path / "trtexec", tmp_path / "words"
    program.write_text(
        f"#!/bin/sh\nset -e\nif [ $1 = --help ]; then echo {help_lists}; exit; fi\n"
        f"for word; do echo $word >> {words}; case $word in --onnx=*) test -s ${{word#--onnx=}};; "
        "--saveEngine=*) echo engine > ${word#--saveEngine=};; --*) ;; *) exit 9;; esac; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    subprocess.run(["/bin/sh", str(kit / "engine" / "build.sh")], check=True, cwd=tmp_path)
    assert (kit / "engine" / "model.engine").read_text() == "engine\n"
    used = {word.partition("=")[0] for word in words.read_text().split()}
    assert used == TRTEXEC - {"--help"} - ({"--stronglyTyped"} - {help_lists})


def test_a_trtexec_that_does_not_start_builds_nothing(
    kit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its options are not known then, so an engine of other types might be built."""
    program = tmp_path / "trtexec"
    program.write_text("#!/bin/sh\n[ $1 != --help ]\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert subprocess.run(["/bin/sh", str(kit / "engine" / "build.sh")], check=False, cwd=tmp_path).returncode == 1


def test_kit_is_not_an_artifact_until_its_engine_is_there(kit: Path) -> None:
    with pytest.raises(UnverifiedArtifact, match="a build kit, its engine for sm_90 is not built yet.*build.sh"):
        load(kit, allow_unverified=True)
    with pytest.raises(UnverifiedArtifact, match="not built yet"):
        adopt_engine(kit)


def test_kit_needs_a_name(demo: Checkpoint, tmp_path: Path) -> None:
    options = Options(build=BuildOptions(kit=True))
    with pytest.raises(UsageError, match="name its GPU"):
        Export(demo, options).check([Job("trt", "bf16", tmp_path / "kit")])
    misspelt = Options(build=BuildOptions(kit=True, arch="hopper"))
    with pytest.raises(UsageError, match="--arch is 'hopper'"):
        Export(demo, misspelt).check([Job("trt", "bf16", tmp_path / "kit")])
    with pytest.raises(UsageError, match="--build-kit is for --target trt, not for 'trt-rtx'"):
        Export(demo, options).check([Job("trt-rtx", "bf16", tmp_path / "kit")])


# The runtime, with a stand-in of the engine interface: its "engine" is the fp32 graph, run by ONNX Runtime.


class FakeStream:
    """Device memory is a table of arrays; work is done when it is queued, or kept while a graph is recorded."""

    made: ClassVar[list["FakeStream"]] = []
    memory: ClassVar[dict[int, NDArray[np.uint8]]] = {}

    def __init__(self) -> None:
        self.handle, self.closed, self.launches = 7 + len(self.made), False, 0
        self._recording: list[Callable[[], None]] | None = None
        self.made.append(self)

    def device_bytes(self, size_bytes: int) -> int:
        address = 1 + len(self.memory)
        self.memory[address] = np.zeros(size_bytes, np.uint8)
        return address

    def pinned(self, count: int, dtype: Any) -> NDArray[Any]:
        return np.zeros(count, dtype)

    def queue(self, work: Callable[[], None]) -> None:
        work() if self._recording is None else self._recording.append(work)

    def to_device(self, address: int, host: NDArray[Any]) -> None:
        def copy() -> None:
            self.memory[address][: host.nbytes] = host.view(np.uint8)

        self.queue(copy)

    def to_host(self, host: NDArray[Any], address: int) -> None:
        def copy() -> None:
            host.view(np.uint8)[:] = self.memory[address][: host.nbytes]

        self.queue(copy)

    def wait(self) -> None:
        pass

    def recorded(self, work: Callable[[], None]) -> Any:
        self._recording = []
        work()
        steps, self._recording = self._recording, None

        def launch() -> None:
            self.launches += 1
            for step in steps:
                step()

        return SimpleNamespace(launch=launch, close=lambda: None)

    def close(self) -> None:
        self.closed = True


class FakeContext:
    def __init__(self, session: ort.InferenceSession, ranges: tuple[Any, ...]) -> None:
        self._session, self._ranges = session, ranges
        self._profile: Any = None
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch = 0

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self._profile = self._ranges[number]
        return True

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        assert size_bytes >= 1000
        self._scratch = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile[name].min <= shape <= self._profile[name].max, "outside the profile"
        self._shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self._scratch and set(self._addresses) == {*self._shapes, "logits"}
        shapes = dict(self._shapes)

        def run() -> None:
            memory = FakeStream.memory
            feeds = {
                name: memory[self._addresses[name]].view(np.int64)[: shape[0]].copy() for name, shape in shapes.items()
            }
            (logits,) = self._session.run(None, feeds)
            memory[self._addresses["logits"]][: logits.nbytes] = logits.reshape(-1).view(np.uint8)

        next(made for made in FakeStream.made if made.handle == stream).queue(run)
        return True


@pytest.fixture
def card(kit: Path, demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit for sm_90 on a machine with that GPU, whose "engine" has been built."""
    FakeStream.made, FakeStream.memory = [], {}
    onnx_path = tmp_path / "packed.onnx"
    packed_onnx(rewrite(demo), "float32", onnx_path)
    shutil.copyfile(onnx_path, kit / "engine" / "model.engine")
    ranges = tuple(profiles(512))

    def deserialised(content: bytes) -> Any:
        if not content.startswith(b"\x08"):
            return None
        session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        return SimpleNamespace(
            get_device_memory_size_for_profile_v2=lambda number: 1000 + number,
            create_execution_context=lambda strategy: FakeContext(session, ranges),
        )

    module: Any = ModuleType("tensorrt")
    module.__version__ = "10.14.1.48"
    module.Logger = lambda level: None
    module.Logger.ERROR = 1
    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialised)
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    cuda: Any = ModuleType("ettin.gpu.engines.cuda")
    cuda.Stream = FakeStream
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "ettin.gpu.engines.cuda", cuda)
    here = Gpu("NVIDIA H100", "sm_90", "580.95.05")
    monkeypatch.setattr(on_tensorrt, "gpus", lambda: [here])
    return kit


def test_from_kit_to_verified_artifact(card: Path, demo_artifacts: dict[tuple[str, str], Path]) -> None:
    assert adopt_engine(card) and not adopt_engine(card)
    assert Manifest.read(card).needs.version == "10.14.1.48"
    verification = verify(card)
    assert verification.ok and verification.runtime == "TensorRT 10.14.1.48, sm_90, bf16"
    assert verification.parity.max_abs_error < 1e-4
    record_verified(card, verification)
    pairs = [("What is the red planet?", "Mars " * count) for count in (1, 5, 200, 40, 2)] * 10
    with load(card) as runtime, load(demo_artifacts["onnx", "fp32"]) as other:
        expected = other.predict(pairs)
        for _ in range(3):
            np.testing.assert_allclose(runtime.predict(pairs), expected, atol=1e-4, rtol=1e-4)
    assert all(stream.closed for stream in FakeStream.made)


def test_recurring_shapes_run_as_graphs(card: Path) -> None:
    adopt_engine(card)
    with load(card, allow_unverified=True) as runtime:
        for _ in range(6):
            runtime.rank("query", ["one document", "another one"])
    assert sum(stream.launches for stream in FakeStream.made) == 4  # each of two slots: queued once, then as a graph


def test_more_than_the_engine_holds(card: Path) -> None:
    adopt_engine(card)
    with load(card, allow_unverified=True) as runtime:
        assert isinstance(runtime, on_tensorrt.TensorRtRuntime)
        with pytest.raises(ShapeError, match="a batch of 1 pairs, 600 tokens, the longest of 600, is more than"):
            runtime.score(Batch.of([np.ones(600, np.int32)], 0))


def test_wrong_card_version_or_engine(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt_engine(card)
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.4.0")
    with pytest.raises(HardwareError, match="compiled by tensorrt 10.14.1.48, installed is 11.4.0.*Export again"):
        load(card, allow_unverified=True)
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.14.1.48")
    monkeypatch.setattr(on_tensorrt, "gpus", lambda: [CARD])
    with pytest.raises(
        HardwareError, match=r"is for sm_90, the GPU here \(NVIDIA GeForce RTX 3090\) is sm_86.*--arch sm_86"
    ):
        load(card, allow_unverified=True)
    monkeypatch.setattr(on_tensorrt, "gpus", lambda: [Gpu("NVIDIA H100", "sm_90", "580")])
    (card / "engine" / "model.engine").write_bytes(b"engine of another world")
    manifest = json.loads((card / MANIFEST_NAME).read_bytes())
    with pytest.raises(DamagedArtifact, match="bytes, manifest.json says"):
        load(card, allow_unverified=True)
    assert manifest["engine"]["arch"] == "sm_90"


def test_settings_that_an_engine_has_not(card: Path) -> None:
    adopt_engine(card)
    with pytest.raises(UsageError, match="threads: target 'trt' on device 'cuda' has no such setting"):
        load(card, allow_unverified=True, threads=2)


def test_missing_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"target 'trt' needs tensorrt, .*ettin-export\[trt\]"):
        tensorrt_builder.builder_module("trt")
