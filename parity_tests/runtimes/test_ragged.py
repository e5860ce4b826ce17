"""Our attention kernel for OpenVINO: against the formula in float64, in the graph, and where it can't be used."""

import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset15 as op
from support import rewrite, run
from torch import Tensor

from ettin.artifacts.files import list_files
from ettin.artifacts.manifest import Arithmetic, Manifest
from ettin.export.targets.openvino_ops import OpenVinoOps
from ettin.export.targets.to_openvino import share_weights
from ettin.graph.fold import rope_tables
from ettin.runtimes import load
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines import openvino_kernels
from ettin.runtimes.engines.openvino_kernels import HEAD_DIM, RAGGED_NAME, SWITCH, Problem, kernels, problem

HEADS, THETA = 2, 160000.0
LENGTHS = (1, 17, 31, 32, 33, 64, 65, 130, 257, 300, 700)
Artifacts = dict[tuple[str, str], Path]


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
    library = kernels()
    assert library
    return library


def compiled(library: Path, window: int, first_only: bool, threads: int) -> ov.CompiledModel:
    q, k, v = (op.parameter([1, -1, HEADS * HEAD_DIM], ov.Type.f32) for _ in "qkv")
    bounds = op.parameter([-1], ov.Type.i64)
    mixed = OpenVinoOps({}, op.constant).ragged_attention(q, k, v, bounds, window, THETA, first_only, "")
    core = ov.Core()
    core.add_extension(str(library))
    options = {"INFERENCE_PRECISION_HINT": "bf16", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    return core.compile_model(ov.Model([mixed], [q, k, v, bounds]), "CPU", options)


def expected(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One sequence [tokens, H] in float64, but for queries (in powers of 2) and keys, rounded to bf16 once turned."""
    cos, sin = rope_tables(THETA, len(k), HEAD_DIM, torch.float64)

    def heads(x: Tensor) -> Tensor:
        return x.double().reshape(len(x), HEADS, HEAD_DIM).transpose(0, 1)

    def rotated(x: Tensor, factor: float = 1.0) -> Tensor:
        left, right = x.chunk(2, -1)
        return (factor * (x * cos + torch.cat((-right, left), -1) * sin)).bfloat16().double()

    scores = rotated(heads(q), math.log2(math.e)) @ rotated(heads(k)).transpose(1, 2)
    distance = (torch.arange(len(q))[:, None] - torch.arange(len(k))).abs()
    if window >= 0:
        scores = scores.masked_fill(distance > window, -torch.inf)
    return ((scores * math.log(2)).softmax(-1) @ heads(v)).transpose(0, 1).reshape(len(q), -1)


def inputs(seed: int, size: float) -> tuple[Tensor, Tensor, Tensor, np.ndarray[Any, np.dtype[np.int64]]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS) + 5  # the last belong to no sequence
    q, k, v = (torch.randn(1, tokens, HEADS * HEAD_DIM, generator=generator).bfloat16() for _ in "qkv")
    return (q * size).bfloat16(), k, v, np.cumsum([0, *LENGTHS])


@pytest.mark.parametrize("window", [-1, 0, 5, 64])
# Scores of a few, and of several hundreds, where a row's largest comes late and its weights so far must shrink.
@pytest.mark.parametrize("size", [0.125, 5.0])
def test_equals_the_formula(usable: Path, window: int, size: float) -> None:
    q, k, v, bounds = inputs(0, size)
    found = torch.from_numpy(compiled(usable, window, False, 1)([*map(as_floats, (q, k, v)), bounds])[0])
    assert found.shape == q.shape and not found[:, bounds[-1] :].any()
    for begin, end in itertools.pairwise(bounds):
        wanted = expected(q[0, begin:end], k[0, begin:end], v[0, begin:end], window)
        # Weights and results are rounded to 8 bits.
        error = (found[0, begin:end] - wanted).abs()
        assert error.mean() <= 2e-3 and error.max() <= 3e-2, end - begin


@pytest.mark.parametrize("window", [-1, 5, 64])
def test_first_tokens_alone(usable: Path, window: int) -> None:
    q, k, v, bounds = inputs(1, 0.125)
    every = compiled(usable, window, False, 1)([*map(as_floats, (q, k, v)), bounds])[0]
    first = compiled(usable, window, True, 1)([as_floats(q[:, bounds[:-1]]), *map(as_floats, (k, v)), bounds])[0]
    assert first.shape == (1, len(LENGTHS), HEADS * HEAD_DIM)
    assert np.array_equal(first[0], every[0, bounds[:-1]])


def test_threads_share_a_batch(usable: Path) -> None:
    *data, bounds = inputs(2, 0.125)
    results = [compiled(usable, 64, False, threads)([*map(as_floats, data), bounds])[0] for threads in (1, 2)]
    assert np.array_equal(*results)


def test_nan_is_not_hidden(usable: Path) -> None:
    q, k, v, bounds = inputs(3, 0.125)
    k[0, 2] = torch.nan  # of the second sequence
    found = compiled(usable, -1, False, 1)([*map(as_floats, (q, k, v)), bounds])[0]
    assert np.isnan(found[0, 1:18]).all() and not np.isnan(found[0, :1]).any() and not np.isnan(found[0, 18:]).any()


def as_floats(x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return x.float().numpy()


@pytest.fixture(params=["int8", "bf16"])
def artifact(request: pytest.FixtureRequest, usable: Path, demo_artifacts: Artifacts) -> Path:
    return demo_artifacts["openvino", request.param]


@pytest.fixture
def batch() -> Batch:
    generator = np.random.default_rng(0)
    return Batch.of([generator.integers(5, 9000, length).astype(np.int32) for length in (40, 7, 333, 600, 64, 1)], 0)


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
    assert abs(ours - gold).mean() <= 2 * abs(stock - gold).mean() and not np.array_equal(ours, stock)


def test_company_changes_nothing(artifact: Path, batch: Batch) -> None:
    """Without padding and with sums in one order, a pair's score does not depend on its batch, bit by bit."""
    with load(artifact) as runtime:
        parts = np.split(batch.ids, batch.cu_seqlens[1:-1])
        alone = np.concatenate([runtime.score(Batch.of([each], 0)) for each in parts])
        assert np.array_equal(runtime.score(batch), alone)


def test_from_the_cache(artifact: Path, batch: Batch, tmp_path: Path) -> None:
    scores = []
    for _ in range(2):
        with load(artifact, cache_dir=tmp_path) as runtime:
            scores.append(runtime.score(batch))
    assert len(list(tmp_path.rglob("*.blob"))) == 1 and np.array_equal(*scores)


def test_weights_are_stored_once(artifact: Path) -> None:
    assert Manifest.read(artifact).graph.ragged
    folder = artifact / "openvino"
    assert [each.name for each in folder.glob("*.bin")] == ["openvino_model.bin"] and (folder / RAGGED_NAME).exists()
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


def test_only_where_it_was_proven(usable: Path, demo_artifacts: Artifacts, tmp_path: Path) -> None:
    copied = tmp_path / "artifact"
    shutil.copytree(demo_artifacts["openvino", "bf16"], copied)
    rewrite(copied, lambda content: content["parity"].update(arithmetic=["bf16", "f32"]))
    with load(copied) as runtime:
        assert runtime.arithmetic == "bf16" and "own attention kernel) is possible here" in runtime.description
    with load(copied, allow_unverified=True) as runtime:
        assert runtime.description.endswith("CPU, bf16 (own attention kernel) arithmetic")


def test_exported_elsewhere_proven_here(usable: Path, tmp_path: Path) -> None:
    """As exported on a machine without AMX: the graph is there, and used after `ettin-verify` passed with it."""
    folder = tmp_path / "openvino-bf16"
    options = ("--size", "demo", "--target", "openvino", "--precision", "bf16", "--output", folder)
    said("ettin-export", *options, cwd=tmp_path, ONEDNN_MAX_CPU_ISA="AVX2_VNNI")
    before = Manifest.read(folder)
    assert before.graph.ragged and before.parity.arithmetic == ("f32",)
    with load(folder) as runtime:
        assert runtime.arithmetic == "f32" and runtime.unproven_arithmetic is Arithmetic.BF16_OWN_ATTENTION
        scores = runtime.predict([("red planet", "Mars is the red planet.")])
    (folder / "manifest.json.new").mkdir()  # in the way of a new manifest
    assert "not recorded" in said("ettin-verify", folder, cwd=tmp_path) and Manifest.read(folder) == before
    (folder / "manifest.json.new").rmdir()
    assert "used here from now on" in said("ettin-verify", folder, cwd=tmp_path)
    after = Manifest.read(folder)
    assert after.parity == before.parity.model_copy(
        update={"arithmetic": (Arithmetic.F32, Arithmetic.BF16_OWN_ATTENTION)}
    )
    with load(folder) as runtime:
        assert runtime.arithmetic is Arithmetic.BF16_OWN_ATTENTION and not runtime.unproven_arithmetic
        assert runtime.predict([("red planet", "Mars is the red planet.")]) == pytest.approx(scores, abs=0.1)
    assert "used here from now on" not in said("ettin-verify", folder, cwd=tmp_path)
    assert Manifest.read(folder) == after


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


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_kernels, "has_amx_bf16", lambda: True)


def test_limits_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("AVX2_VNNI", "AVX512_CORE_BF16"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert problem() == Problem("no AMX, or switched off by ONEDNN_MAX_CPU_ISA") and kernels() is None


@pytest.mark.usefixtures("with_amx")
def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert problem() == Problem(f"switched off by {SWITCH}") and kernels() is None


@pytest.mark.usefixtures("with_amx")
def test_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_kernels, "LIBRARY", "ettin.runtimes.nothing_of_that_name")
    assert "not compiled at installation" in str(problem()) and kernels() is None


@pytest.mark.usefixtures("with_amx")
def test_compiled_for_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(os.urandom(64))
    monkeypatch.setattr(openvino_kernels, "_library", lambda: tmp_path / "library.so")
    assert "compiled for another OpenVINO than 20" in str(problem()) and kernels() is None
