"""The tables of what is computed of each token alone: they change no score, whatever fills them."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from ettin.export.proof_pairs import natural_pairs
from ettin.export.targets.openvino_ops import OpenVinoOps
from ettin.graph import ModelShape
from ettin.runtimes import load
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines import on_openvino
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime
from ettin.runtimes.engines.openvino_kernels import problem
from ettin.runtimes.engines.openvino_tokens import TokenTables

Artifacts = dict[tuple[str, str], Path]
FIRST_PRODUCTS = [f"layers.0.{name}.matmul" for name in "qkv"]
PAIRS = [(pair.query, pair.document) for pair in natural_pairs()]


@pytest.fixture(autouse=True)
def usable() -> None:
    unusable = problem()
    if unusable:
        pytest.skip(f"the attention kernel can't run here: {unusable.why}")


@pytest.fixture(params=["int8", "bf16", "fp32"])
def artifact(request: pytest.FixtureRequest, demo_artifacts: Artifacts) -> Path:
    return demo_artifacts["openvino", request.param]


def opened(artifact: Path, threads: int = 1) -> OpenVinoRuntime:
    runtime = load(artifact, threads=threads)
    assert isinstance(runtime, OpenVinoRuntime)
    return runtime


def tables_of(runtime: OpenVinoRuntime) -> TokenTables:
    assert runtime._tables
    return runtime._tables


def test_scores_are_the_same(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, in both arithmetics, with tables that are empty, and again with those that are filled."""
    for isa in ("", "AVX512_CORE_VNNI"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        with monkeypatch.context() as patch:
            patch.setattr(on_openvino, "_SMALL_MODEL_PARAMETERS", 0)
            with opened(artifact) as runtime:
                assert runtime._tables is None and len(runtime.model_for(64).inputs) == 2
                wanted = runtime.predict(PAIRS)
        with opened(artifact) as runtime:
            assert len(runtime.model_for(64).inputs) == 6
            for _ in range(2):
                assert np.array_equal(runtime.predict(PAIRS), wanted)


def test_products_are_gone(artifact: Path) -> None:
    with opened(artifact) as runtime:
        names = [node.get_friendly_name() for node in runtime.model_for(64).get_ops()]
    assert "layers.0.o.matmul" in names and not [name for name in names if name in FIRST_PRODUCTS]


def test_filled_by_many_threads(artifact: Path) -> None:
    """Each token has one row, and no thread reads a row before it is written."""
    parts = [PAIRS[start::8] for start in range(8)]
    with opened(artifact) as runtime:
        wanted = [runtime.predict(part) for part in parts]
    for _ in range(3):
        with opened(artifact, threads=2) as runtime, ThreadPoolExecutor(8) as pool:
            found = list(pool.map(runtime.predict, parts))
            rows = tables_of(runtime)._rows
        assert all(map(np.array_equal, found, wanted))
        used = np.sort(rows[rows >= 0])
        assert np.array_equal(used, np.arange(len(used)))


def test_every_token_has_room(artifact: Path) -> None:
    with opened(artifact) as runtime:
        tables = tables_of(runtime)
        ids = np.arange(ModelShape.from_json(runtime.manifest.source.shape).vocab_size)
        assert np.array_equal(np.sort(tables.rows(ids)), ids)
        assert np.isfinite(runtime.score(Batch.of([ids[-300:].astype(np.int32)], 0))).all()


def test_closing_frees_them(artifact: Path) -> None:
    runtime = opened(artifact)
    tables = weakref.ref(tables_of(runtime))
    runtime.close()
    gc.collect()
    assert tables() is None


# What a graph computes of ids and of the embedding table beside the first attention: queries, and what is added.
GRAPHS = {
    "its own": lambda ids, bounds, key: (key, []),
    "lengths": lambda ids, bounds, key: (op.add(key, op.convert(op.reduce_sum(bounds, ZERO), "f32")), []),
    "ids elsewhere": lambda ids, bounds, key: (key, [op.convert(ids, "f32")]),
    "their number elsewhere": lambda ids, bounds, key: (key, [op.convert(op.shape_of(ids), "f32")]),
}
ZERO = op.constant(np.int64(0))


@pytest.mark.parametrize("kind", [*GRAPHS, "other ids", "first tokens", "nothing"])
def test_only_for_graphs_that_look_ids_up(kind: str) -> None:
    """The first query must depend on token ids alone. No other node may read the ids: it would get row numbers."""
    ids, bounds = op.parameter([-1], ov.Type.i64), op.parameter([-1], ov.Type.i64)
    ids.output(0).get_tensor().set_names({"input_ids"})
    looked_up = op.add(ids, op.constant(np.int64(1))) if kind == "other ids" else ids
    key = op.gather(op.constant(np.ones((9, 64), np.float32)), op.unsqueeze(looked_up, ZERO), ZERO)
    query, others = GRAPHS.get(kind, GRAPHS["its own"])(ids, bounds, key)
    mixed = OpenVinoOps({}, op.constant).ragged_attention(
        query, key, key, bounds, 1, -1, 1e4, kind == "first tokens", ""
    )
    results = [key] if kind == "nothing" else [mixed]
    model = ov.Model([*results, *others], [ids, bounds])
    assert (TokenTables.of(model, ov.Core(), {}) is not None) == (kind in ("its own", "their number elsewhere"))
