"""How CPU threads are counted and divided, the model cache, and OpenVINO's two forms of a graph."""

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import OutputError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.runtimes import load, machine
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines import on_openvino
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime
from ettin.runtimes.engines.openvino_kernels import SWITCH, Variant
from ettin.runtimes.machine import CpuPlan, available_cpus, default_threads, is_hybrid, uses_all_cpus

PAIRS = [("which planet is red", "Mars is the red planet."), ("what do bees make", "Bees make honey and wax.")] * 20
SHORT = [[1], [8, 3], [66, 65, 64, 63], [130, 129, 128], [193, 192], [257, 256, 255], [512, 100]]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def hybrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sysfs of a processor with 4 performance cores of two threads and 4 efficiency cores."""
    for cpu in range(12):
        siblings = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" if cpu < 8 else str(cpu)
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{siblings}\n")
    write(tmp_path / "devices/cpu_core/cpus", "0-7\n")
    write(tmp_path / "devices/cpu_atom/cpus", "8-11\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    return tmp_path


def test_cores_are_counted_once(hybrid: Path) -> None:
    assert is_hybrid(hybrid)
    assert available_cpus(hybrid) == 8
    assert available_cpus(hybrid, performance_only=True) == 4
    assert uses_all_cpus(8, hybrid) and not uses_all_cpus(7, hybrid)
    assert uses_all_cpus(4, hybrid, performance_only=True)


def test_affinity_is_respected(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 9})
    assert available_cpus(hybrid) == 3
    assert available_cpus(hybrid, performance_only=True) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {9, 10, 11})
    assert available_cpus(hybrid, performance_only=True) == 3  # there are no others


@pytest.mark.parametrize(("streams", "expected", "kind"), [(None, 8, "ANY_CORE"), (1, 4, "PCORE_ONLY")])
def test_one_stream_leaves_out_slow_cores(
    hybrid: Path, monkeypatch: pytest.MonkeyPatch, demo_artifacts: dict[tuple[str, str], Path],
    streams: int | None, expected: int, kind: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(on_openvino, "is_hybrid", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "available_cpus", lambda system, **options: available_cpus(hybrid, **options))
    with load(demo_artifacts["openvino", "int8"], streams=streams) as runtime:
        options = runtime._options  # type: ignore[attr-defined]
        assert options["INFERENCE_NUM_THREADS"] == expected
        assert options["SCHEDULING_CORE_TYPE"] == kind
        assert len(runtime.predict(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize(("content", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)])
def test_container_limit(hybrid: Path, content: str, expected: int) -> None:
    write(hybrid / "fs/cgroup/cpu.max", f"{content}\n")
    assert available_cpus(hybrid) == expected


def test_container_limit_of_cgroup_v1(hybrid: Path) -> None:
    write(hybrid / "fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    write(hybrid / "fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert available_cpus(hybrid) == 3
    write(hybrid / "fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert available_cpus(hybrid) == 8


def test_without_sysfs_every_processor_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert available_cpus(tmp_path) == 3 and not is_hybrid(tmp_path)


@pytest.mark.parametrize(
    ("variable", "expected"), [("1", 1), ("3", 3), ("2,1", 2), ("64", 8), ("", 8), ("0", 8), ("all", 8), ("-1", 8)]
)
def test_threads_of_a_worker_process(
    hybrid: Path, monkeypatch: pytest.MonkeyPatch, variable: str, expected: int
) -> None:
    """Ray and Spark tell a worker process its share of the cores, but do not bind it to them."""
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert default_threads(hybrid) == expected


def test_a_one_core_worker_gets_one_stream(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert CpuPlan.of(None, None) == CpuPlan(streams=1, threads_per_stream=1)
    with load(demo_artifacts["onnx", "int8"]) as runtime:
        assert runtime.limits.concurrency == 1


def test_threads_are_divided_among_streams() -> None:
    assert CpuPlan.of(8, None) == CpuPlan(streams=8, threads_per_stream=1)
    assert CpuPlan.of(8, 1) == CpuPlan(streams=1, threads_per_stream=8)
    assert CpuPlan.of(8, 3) == CpuPlan(streams=3, threads_per_stream=2)
    with pytest.raises(UsageError, match="streams is 3, expected at most the number of threads, 2"):
        CpuPlan.of(2, 3)


@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_streams_change_no_score(demo_artifacts: dict[tuple[str, str], Path], target: str) -> None:
    scores = []
    for streams in (1, 2):
        with load(demo_artifacts[target, "fp32"], threads=2, streams=streams) as runtime:
            assert runtime.limits.concurrency == streams
            scores.append(runtime.predict(PAIRS))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_settings_without_use_are_refused(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(UsageError, match="streams: target 'transformers' on device 'cpu' has no such setting"):
        load(demo_artifacts["transformers", "fp32"], streams=1)
    with pytest.raises(UsageError, match="cache_dir: target 'onnx'"):
        load(demo_artifacts["onnx", "fp32"], cache_dir="somewhere")
    with pytest.raises(UsageError, match="streams is 0"):
        load(demo_artifacts["onnx", "fp32"], streams=0)


def scores(artifact: Path, cache: Path) -> list[float]:
    with load(artifact, cache_dir=cache) as runtime:
        return list(runtime.predict(PAIRS).tolist())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_cached_model_gives_the_same_scores(
    demo_artifacts: dict[tuple[str, str], Path], precision: str, tmp_path: Path
) -> None:
    artifact = demo_artifacts["openvino", precision]
    first = scores(artifact, tmp_path / "cache")
    (blob,) = (tmp_path / "cache").rglob("*.blob")
    written = blob.stat().st_mtime_ns
    assert scores(artifact, tmp_path / "cache") == first
    assert blob.stat().st_mtime_ns == written  # taken, not made again


def test_damaged_cache_is_made_again(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    artifact = demo_artifacts["openvino", "fp32"]
    first = scores(artifact, tmp_path)
    (blob,) = tmp_path.rglob("*.blob")
    content = bytearray(blob.read_bytes())
    content[len(content) // 4 :: 64] = b"\x7f" * len(content[len(content) // 4 :: 64])
    blob.chmod(0o600)
    blob.write_bytes(content)
    assert scores(artifact, tmp_path) == first


def test_artifacts_do_not_share_a_cache_entry(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        scores(demo_artifacts["openvino", precision], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_that_cant_be_written(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    with pytest.raises(OutputError, match=r"can't be written \(Not a directory\)\. Choose another cache_dir"):
        load(demo_artifacts["openvino", "fp32"], cache_dir=tmp_path / "file")


def one_batch(lengths: list[int]) -> Batch:
    generator = np.random.default_rng(sum(lengths))
    return Batch.of([generator.integers(5, 8000, length).astype(np.int32) for length in lengths], 8189)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_short_form_scores_as_the_whole_graph(
    demo_artifacts: dict[tuple[str, str], Path], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "off")  # our kernel has one graph for every length
    with load(demo_artifacts["openvino", precision]) as runtime:
        assert isinstance(runtime, OpenVinoRuntime) and runtime.manifest.graph.block_threshold_tokens == 512
        short = [runtime.score(batch) for batch in map(one_batch, SHORT)]
        assert len(runtime._forms) == 1  # nothing long yet: nothing compiled for it
        monkeypatch.setattr(runtime, "_threshold_tokens", 0)
        whole = [runtime.score(batch) for batch in map(one_batch, SHORT)]
        assert len(runtime._forms) == 2
        for ours, expected in zip(short, whole, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize(
    ("proven", "allow_unverified", "expected"),
    [
        (["bf16-own-attention", "bf16", "f32"], False, ("bf16_avx512", "bf16-own-attention", None)),
        (["bf16", "f32"], False, (None, "bf16", "bf16-own-attention")),
        (["f32-own-attention", "f32"], False, ("f32_avx2", "f32-own-attention", "bf16-own-attention")),
        (["f32"], False, (None, "f32", "bf16-own-attention")),
        ([], False, (None, "f32", "bf16-own-attention")),
        ([], True, ("bf16_avx512", "bf16-own-attention", None)),
    ],
)
def test_the_fastest_proven_arithmetic_is_chosen(
    manifest_of: Callable[..., Manifest], proven: list[str], allow_unverified: bool,
    expected: tuple[str | None, str, str | None],
) -> None:  # fmt: skip
    kernel, arithmetic, unproven = on_openvino._chosen(manifest_of("bf16", proven), allow_unverified)
    assert (kernel and kernel.name, arithmetic, unproven) == expected


@pytest.fixture
def manifest_of(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Manifest]:
    """Manifests of what runs on a processor with AVX-512, but no AMX, by precision and proven arithmetic."""
    names = {("bf16", "bf16"): "bf16_avx512", ("int8", "f32"): "int8_avx512", ("f32", "f32"): "f32_avx2"}

    def variant(products: str, floats: str, head_dim: int) -> Variant | None:
        name = names.get((products, floats))
        return Variant(name, products, (floats,), "") if name else None

    monkeypatch.setattr(on_openvino, "has_bf16", lambda: True)
    monkeypatch.setattr(on_openvino, "variant", variant)

    def made(precision: str, proven: list[str]) -> Manifest:
        manifest = Manifest.read(demo_artifacts["openvino", precision])
        graph = manifest.graph.model_copy(update={"ragged": True})
        parity = manifest.parity.model_copy(update={"arithmetic": tuple(map(Arithmetic, proven))})
        return manifest.model_copy(update={"graph": graph, "parity": parity})

    return made


@pytest.mark.parametrize(
    ("precision", "amx", "has_bf16", "expected"),
    [
        ("int8", False, True, "f32-int8-attention"),
        ("int8", True, True, "bf16-own-attention"),
        ("int8", False, False, "f32-int8-attention"),
        ("bf16", False, False, "f32-own-attention"),
        ("fp32", True, True, "f32-own-attention"),
    ],
)
def test_the_fastest_arithmetic_of_a_processor(
    manifest_of: Callable[..., Manifest], precision: str, amx: bool, has_bf16: bool, expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    manifest = manifest_of(precision, [])
    if amx:
        others = on_openvino.variant
        best = Variant("bf16_amx", "bf16", ("bf16",), "")
        monkeypatch.setattr(on_openvino, "variant", lambda *way: best if way[0] == "bf16" else others(*way))
    monkeypatch.setattr(on_openvino, "has_bf16", lambda: has_bf16)
    assert on_openvino._chosen(manifest, True)[1] == expected


def test_short_form_has_less_to_do(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "off")
    with load(demo_artifacts["openvino", "fp32"]) as runtime:
        assert isinstance(runtime, OpenVinoRuntime)
        models = [runtime.model_for(tokens) for tokens in (2048, 100)]
    gathers = [sum(node.get_type_name() == "Gather" for node in each.get_ordered_ops()) for each in models]
    local_layers = 4
    assert gathers[0] - gathers[1] >= 2 * local_layers


def test_an_artifact_that_is_gone_still_scores_long_inputs(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """The long form is compiled when it is first needed: from what was loaded, not from what is there by then."""
    shutil.copytree(demo_artifacts["openvino", "fp32"], tmp_path / "artifact")
    long = [("red planet", "Mars and Venus " * 300)]
    with load(tmp_path / "artifact") as runtime, load(demo_artifacts["openvino", "fp32"]) as other:
        shutil.rmtree(tmp_path / "artifact")
        np.testing.assert_allclose(runtime.predict(long), other.predict(long), atol=1e-6)


@pytest.mark.parametrize("switch", ["", "off"])
def test_int8_products_on_arm_have_four_dimensions(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    """All that have int8 weights, and no score changes."""
    monkeypatch.setenv(SWITCH, switch)
    monkeypatch.setattr(on_openvino, "has_bf16", lambda: False)
    scores, dimensions = [], []
    for is_arm in (False, True):
        monkeypatch.setattr(on_openvino, "is_arm", lambda is_arm=is_arm: is_arm)
        with load(demo_artifacts["openvino", "int8"]) as runtime:
            assert isinstance(runtime, OpenVinoRuntime)
            scores.append(runtime.predict(PAIRS[:4], activation_fn="identity"))
            products = [node for node in runtime.model_for(64).get_ops() if node.get_type_name() == "MatMul"]
            int8 = [node for node in products if any(map(reads_int8, node.input_value(1).get_node().input_values()))]
            dimensions.append({node.get_output_partial_shape(0).rank.get_length() for node in int8})
    assert dimensions == [{3}, {4}]
    assert np.array_equal(*scores)


def reads_int8(output: Any) -> bool:
    node = output.get_node()
    return node.get_type_name() == "Convert" and node.input_value(0).get_element_type().get_type_name() == "i8"


def test_arm_has_no_flags_of_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although an emulated one has the /proc/cpuinfo of the processor that emulates it."""
    monkeypatch.setattr(machine, "_cpu_info", lambda key: "avx2 avx512_bf16")
    monkeypatch.setattr(machine, "flags", machine.flags.__wrapped__)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert machine.has_bf16() and machine.lacks_vnni()
    for name in ("aarch64", "arm64", "ARM64"):
        monkeypatch.setattr(platform, "machine", lambda name=name: name)
        assert not machine.has_bf16() and not machine.lacks_vnni()


def test_the_limit_of_onednn_is_for_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.is_allowed("AVX2") and not machine.is_allowed("AVX2_VNNI") and machine.is_allowed("NEON")


def test_processes_that_share_a_machine_do_not_share_its_first_core(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO pins threads to the first cores. Two processes of one thread each had half the speed on two cores."""
    for cores, is_pinned in ((1, True), (2, False)):
        monkeypatch.setattr(machine, "_cores", lambda *_, cores=cores: cores)
        with load(demo_artifacts["openvino", "fp32"], threads=1) as runtime:
            form = runtime._form(3)
            runtime.predict(("a", "b"))
            request = runtime._forms[form].get()
            assert request.get_compiled_model().get_property("ENABLE_CPU_PINNING") is is_pinned
            runtime._forms[form].put(request)
