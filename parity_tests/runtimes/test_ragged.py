"""Our attention kernel for OpenVINO: against the formula in float64, in the graph, and where it can't be used."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino as ov
import pytest
from kernel_cases import Case, Kernel, inputs, to_bf16
from kernel_in_openvino import compiled_graph
from openvino import opset15 as op
from support import rewrite, run

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.files import list_files
from ettin.artifacts.manifest import Manifest
from ettin.export.proof_pairs import natural_pairs
from ettin.export.targets.to_openvino import share_weights
from ettin.runtimes import load
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines import on_openvino, openvino_kernels
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime
from ettin.runtimes.engines.openvino_kernels import (
    OPERATION,
    RAGGED_NAME,
    SWITCH,
    Problem,
    Variant,
    compiled,
    problem,
    row_kernels,
    runnable,
    variant,
)
from ettin.runtimes.machine import has_bf16

Artifacts = dict[tuple[str, str], Path]
needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this processor has no bf16 arithmetic")


def said(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command of ours says, which must succeed."""
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def usable() -> Path:
    unusable = problem()
    if unusable:
        pytest.skip(f"the attention kernel can't run here: {unusable.why}")
    library = compiled()
    assert library
    return library


@pytest.fixture(params=["bf16 in bf16", "int8 in f32", "f32 in f32"])
def way(request: pytest.FixtureRequest, usable: Path) -> tuple[Variant, str]:
    products, _, floats = request.param.split(" ")
    found = variant(products, floats, 64)
    if found is None:
        pytest.skip(f"this processor has no attention kernel with products of {request.param}")
    return found, floats


@pytest.mark.parametrize("case", [Case(64, -1), Case(64, 64), Case(64, 5, first_only=True)])
def test_in_a_graph(way: tuple[Variant, str], usable: Path, case: Case) -> None:
    """The same numbers as without an engine, bit by bit; tokens that belong to no sequence give 0."""
    q, k, v = inputs(case, 0.5)
    if case.first_only:
        q = q[case.bounds[:-1]]
    after = np.ones((5, q.shape[1]), np.float32)
    padded = [x if case.first_only and x is q else np.concatenate([x, after]) for x in (q, k, v)]
    found = compiled_graph(case, *way)([*(x[None] for x in padded), case.bounds])[0][0]
    arrays = [to_bf16(x) for x in (q, k, v)] if way[1] == "bf16" else [q, k, v]
    assert np.array_equal(found[: len(q)], Kernel(usable).attend(way[0].name, case, *arrays))
    assert len(found) == len(padded[0]) and not found[len(q) :].any()


def test_rounding_moves_into_the_kernel(way: tuple[Variant, str], demo_artifacts: Artifacts) -> None:
    """In every layer of an int8 artifact; scores stay within what one rounding more or less changes."""
    kernel, floats = way
    if kernel.products == "f32":
        pytest.skip("int8 artifacts have better ways")
    pairs = [(pair.query, pair.document) for pair in natural_pairs()[:40]]
    scores = []
    for rounds in (True, False):
        with load(demo_artifacts["openvino", "int8"], allow_unverified=True) as runtime:
            assert isinstance(runtime, OpenVinoRuntime)
            runtime._kernel, runtime.precision_hint = kernel._replace(rounds=rounds and kernel.rounds), floats
            runtime._forms.clear()
            runtime._tables = None
            nodes = [node for node in runtime.model_for(64).get_ops() if node.get_type_name() == OPERATION]
            steps = [node.get_attributes()["step"] for node in nodes]
            assert all(step > 0 for step in steps) if rounds and kernel.rounds else not any(steps)
            scores.append(runtime.predict(pairs, activation_fn="identity"))
    assert abs(scores[0] - scores[1]).mean() <= 0.02


def test_threads_share_a_batch(way: tuple[Variant, str]) -> None:
    case = Case(64, 64)
    data = [*(x[None] for x in inputs(case, 0.5)), case.bounds]
    results = [compiled_graph(case, *way, threads)(data)[0] for threads in (1, 2)]
    assert np.array_equal(*results)


@pytest.fixture(params=["int8", "bf16", "fp32"])
def artifact(request: pytest.FixtureRequest, usable: Path, demo_artifacts: Artifacts) -> Path:
    return demo_artifacts["openvino", request.param]


@pytest.fixture
def batch() -> Batch:
    generator = np.random.default_rng(0)
    return Batch.of([generator.integers(5, 8192, length).astype(np.int32) for length in (40, 7, 333, 600, 64, 1)], 0)


def test_used_and_right(artifact: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(artifact) as runtime:
        assert "own attention kernel" in runtime.description
        ours = runtime.score(batch)
    monkeypatch.setenv(SWITCH, "off")
    with load(artifact) as runtime:
        assert "own attention kernel" not in runtime.description
        stock = runtime.score(batch)
    with load(artifact.parent / "openvino-fp32") as runtime:
        gold = runtime.score(batch)
    assert abs(ours - gold).mean() <= 2 * abs(stock - gold).mean() + 2e-6 and not np.array_equal(ours, stock)


def test_company_changes_nothing(artifact: Path, batch: Batch) -> None:
    """Without padding and with sums in one order, a pair's score does not depend on its batch, bit by bit."""
    with load(artifact) as runtime:
        parts = np.split(batch.ids, batch.cu_seqlens[1:-1])
        alone = np.concatenate([runtime.score(Batch.of([each], 0)) for each in parts])
        assert np.array_equal(runtime.score(batch), alone)


def test_batches_of_large_models_are_short(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait for a batch, which takes seconds with the largest model."""
    with load(artifact, threads=1) as runtime:
        small = runtime.limits.batch_tokens
    monkeypatch.setattr(on_openvino, "_SMALL_MODEL_PARAMETERS", 1000)
    with load(artifact, threads=1) as runtime:
        assert runtime.limits.batch_tokens < small


def test_from_the_cache(artifact: Path, batch: Batch, tmp_path: Path) -> None:
    scores = []
    for _ in range(2):
        with load(artifact, cache_dir=tmp_path) as runtime:
            scores.append(runtime.score(batch))
    assert len(list(tmp_path.rglob("*.blob"))) == 1 and np.array_equal(*scores)


def test_weights_are_stored_once(artifact: Path) -> None:
    assert Manifest.read(artifact).graph.ragged
    folder = artifact / "openvino"
    assert {path.name for path in folder.glob("*.bin")} == {"openvino_model.bin", "openvino_tokenizer.bin"}
    assert (folder / RAGGED_NAME).exists()
    size_bytes = (folder / "openvino_model.bin").stat().st_size
    used = [
        (int(data.attrib["offset"]), int(data.attrib["size"]))
        for name in ("openvino_model.xml", RAGGED_NAME)
        for data in ElementTree.parse(folder / name).findall("./layers/layer[@type='Const']/data")  # noqa: S314
    ]
    assert all(at + size <= size_bytes for at, size in used)
    assert sum(size for _, size in set(used)) > 0.99 * size_bytes


def test_sharing_adds_what_is_missing(tmp_path: Path) -> None:
    def saved(name: str, *values: list[float]) -> Path:
        x = op.parameter([2], ov.Type.f32)
        y = x
        for each in values:
            y = op.add(y, op.constant(np.array(each, np.float32)))
        ov.save_model(ov.Model([y], [x]), tmp_path / name, compress_to_fp16=False)
        return tmp_path / name

    first, second = saved("a.xml", [1, 2]), saved("b.xml", [10, 20], [1, 2])
    share_weights(second, first)
    assert not second.with_suffix(".bin").exists()
    for path, wanted in ((first, [1, 2]), (second, [11, 22])):
        model = ov.Core().read_model(path, first.with_suffix(".bin"))
        assert ov.Core().compile_model(model, "CPU")([np.zeros(2, np.float32)])[0].tolist() == wanted


@needs_bf16
def test_only_where_it_was_proven(usable: Path, demo_artifacts: Artifacts, tmp_path: Path) -> None:
    copied = tmp_path / "artifact"
    shutil.copytree(demo_artifacts["openvino", "bf16"], copied)
    rewrite(copied, lambda content: content["parity"].update(arithmetic=["bf16", "f32"]))
    with load(copied) as runtime:
        assert runtime.arithmetic == "bf16" and "own attention kernel) is possible here" in runtime.description
    with load(copied, allow_unverified=True) as runtime:
        assert runtime.description.endswith("CPU, bf16 (own attention kernel) arithmetic")


def test_heads_of_32_beside_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant for AMX, which refuses them, was chosen: such an artifact did not load."""
    monkeypatch.setattr(openvino_kernels, "runnable", lambda: list(openvino_kernels._VARIANTS))
    chosen = [variant("bf16", "bf16", head_dim) for head_dim in (64, 32)]
    assert [each and each.name for each in chosen] == ["bf16_amx", "bf16_avx512"]


@needs_bf16
def test_exported_elsewhere_proven_here(
    usable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    export_here: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    """As exported on a machine without bf16 arithmetic: used in bf16 after `ettin-verify` passed with it."""
    folder = tmp_path / "openvino-bf16"
    options = ("--size", "demo", "--target", "openvino", "--precision", "bf16", "--output", folder)
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI")
        exported = export_here(*options)
    assert exported.returncode == 0, exported.stderr
    before = Manifest.read(folder)
    assert before.graph.ragged and before.parity.arithmetic == ("f32-own-attention", "f32")
    with load(folder) as runtime:
        assert runtime.arithmetic is Arithmetic.F32_OWN_ATTENTION
        assert runtime.unproven_arithmetic is Arithmetic.BF16_OWN_ATTENTION
        scores = runtime.predict([("red planet", "Mars is the red planet.")])
    (folder / "manifest.json.new").mkdir()  # in the way of a new manifest
    assert "not recorded" in said("ettin-verify", folder, cwd=tmp_path) and Manifest.read(folder) == before
    (folder / "manifest.json.new").rmdir()
    assert "used here from now on" in said("ettin-verify", folder, cwd=tmp_path)
    after = Manifest.read(folder)
    assert after.parity == before.parity.model_copy(
        update={"arithmetic": (*before.parity.arithmetic, Arithmetic.BF16_OWN_ATTENTION)}
    )
    with load(folder) as runtime:
        assert runtime.arithmetic is Arithmetic.BF16_OWN_ATTENTION and not runtime.unproven_arithmetic
        assert runtime.predict([("red planet", "Mars is the red planet.")]) == pytest.approx(scores, abs=0.1)
    assert "used here from now on" not in said("ettin-verify", folder, cwd=tmp_path)
    assert Manifest.read(folder) == after


@needs_bf16
def test_what_is_not_proven_is_not_used(usable: Path, demo_artifacts: Artifacts, tmp_path: Path) -> None:
    """The kernel's graph is damaged so that its scores are wrong: found, said, and the artifact runs as before."""
    copied = tmp_path / "artifact"
    shutil.copytree(demo_artifacts["openvino", "bf16"], copied)
    graph = copied / "openvino" / RAGGED_NAME
    damaged = graph.read_text().replace('window="64"', 'window="3"')
    assert damaged != graph.read_text()
    graph.write_text(damaged)

    def signed(content: dict[str, Any]) -> None:
        content["parity"]["arithmetic"] = ["bf16", "f32"]
        content["files"] = [each.model_dump() for each in list_files(copied)]

    rewrite(copied, signed)
    words = said("ettin-verify", copied, cwd=tmp_path)
    assert "not used" in words and "bf16 arithmetic is" in words
    assert Manifest.read(copied).parity.arithmetic == ("bf16", "f32")


def test_limits_are_obeyed(usable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert not {"bf16"} & {each.products for each in runnable()} and row_kernels("bf16") is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert [each.name for each in runnable()] == ["f32_avx2"] and problem() is None
    assert row_kernels("f32") == "f32_avx2" and row_kernels("bf16") is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert problem() == Problem("switched off by ONEDNN_MAX_CPU_ISA=SSE41") and variant("f32", "f32", 64) is None


def test_switch(usable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "f32")
    assert {each.products for each in runnable()} == {"f32"}
    monkeypatch.setenv(SWITCH, "off")
    assert problem() == Problem(f"switched off by {SWITCH}") and not runnable()
    monkeypatch.setenv(SWITCH, "int4")
    assert problem() == Problem(f"switched off by {SWITCH}=int4: nothing computes such products here")


def test_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_kernels, "LIBRARY", "ettin.runtimes.nothing_of_that_name")
    assert "not compiled at installation" in str(problem()) and not runnable()


def test_a_library_of_another_version(usable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that was updated and not installed again: OpenVINO's own attention runs."""
    for library in (SimpleNamespace(), SimpleNamespace(ettin_interface=lambda: 0)):
        monkeypatch.setattr(openvino_kernels, "_loaded", lambda *_, library=library: library)
        assert problem() == Problem("compiled by another version of this package", install_again=True)
        assert not runnable() and row_kernels("f32") is None


def test_a_library_that_can_not_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(os.urandom(64))
    monkeypatch.setattr(openvino_kernels, "_library", lambda: tmp_path / "library.so")
    assert "not tested with OpenVINO 20" in str(problem()) and not runnable()


def test_a_later_release(usable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov, "__version__", "2027.1.0.dev20270203-12345-later")
    assert problem() == Problem("not tested with OpenVINO 2027.1, and compiled for another", install_again=True)
