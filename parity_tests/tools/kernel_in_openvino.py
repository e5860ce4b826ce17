"""The kernels in graphs of whatever OpenVINO this process imports, against the same call without an engine.

    PYTHONPATH=FOLDER_WITH_OPENVINO python parity_tests/tools/kernel_in_openvino.py

prints OpenVINO's version and the number of graphs.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino as ov
from kernel_cases import HEADS, THETA, Case, Kernel, inputs, to_bf16
from openvino import opset15 as op

from ettin.export.targets.openvino_ops import OpenVinoOps, save
from ettin.runtimes.engines.openvino_fusion import use_kernels
from ettin.runtimes.engines.openvino_kernels import Variant, compiled, problem, row_kernels, runnable


def compiled_graph(case: Case, variant: Variant, floats: str, threads: int = 1) -> ov.CompiledModel:
    """Attention alone, written to a file and read again. It takes queries, keys, values [1, tokens, H] and bounds."""
    tensors = [op.parameter([1, -1, HEADS * case.head_dim], ov.Type.f32) for _ in "qkv"]
    bounds = op.parameter([-1], ov.Type.i64)
    mixed = OpenVinoOps({}, op.constant).ragged_attention(
        *tensors, bounds, HEADS, case.window, THETA, case.first_only, ""
    )
    core, model = written_and_read(ov.Model([mixed], [*tensors, bounds]))
    use_kernels(model, variant, floats)
    options = {"INFERENCE_PRECISION_HINT": floats, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    return core.compile_model(model, "CPU", options)


def written_and_read(model: ov.Model) -> tuple[ov.Core, ov.Model]:
    """The graph with our kernels in place of the operations that stand for them where it was written."""
    core = ov.Core()
    core.add_extension(str(compiled()))
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "model.xml")
        return core, core.read_model(Path(folder) / "model.xml")


def rounded(
    x: ov.Node, low: float = -4.0, high: float = 4.0 * 127 / 128, levels: int = 256, wider: float = 1.0
) -> ov.Node:
    """x rounded to levels from low to high, by default to int8; `wider`: what the result is multiplied by."""
    bounds = [op.constant(np.float32(bound)) for bound in (low, high, wider * low, wider * high)]
    return op.fake_quantize(x, *bounds, levels)


def rows_graph(kind: str, floats: str, size: int = 64) -> ov.CompiledModel:
    """A residual with its norm and a gate, as in two layers; it takes x [1, tokens, size].

    Args:
        kind: "ours": norms and gates are rounded to int8 by our kernels; "stock": by OpenVINO's nodes; "exact": not.
        floats: what is between the products.
        size: of a row.
    """
    random = np.random.default_rng(0)
    x = op.parameter([1, -1, size], ov.Type.f32)
    ops = OpenVinoOps({name: random.standard_normal((size, size), np.float32) / 8 for name in "abcd"}, op.constant)

    def whole(x: ov.Node) -> ov.Node:
        return x if kind == "exact" else rounded(x)

    residual = op.add(x, ops.linear(x, "a"))
    for _ in range(2):
        normed = whole(ops.normalise(residual, 1e-5))
        gated = whole(op.multiply(ops.gelu(ops.linear(normed, "b")), ops.linear(normed, "c")))
        residual = op.add(residual, ops.linear(gated, "d"))
    model = ov.Model([residual], [x])
    if kind == "ours":
        use_kernels(model, next(each for each in runnable() if floats in each.floats), floats)
        assert own_rows(model) == ["AddedNorm"] * 2 + ["GatedGelu"] * 2
    core = ov.Core()
    core.add_extension(str(compiled()))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": floats})


def own_rows(model: ov.Model) -> list[str]:
    """The types of the nodes of our kernels on rows."""
    return sorted(name for node in model.get_ops() if (name := node.get_type_name()) in ("AddedNorm", "GatedGelu"))


def compare_rows(floats: str) -> None:
    """Our kernels are nearer to what is not rounded to int8 than OpenVINO's nodes, which have one step for all rows."""
    x = np.random.default_rng(1).standard_normal((1, 70, 64), np.float32)
    exact = rows_graph("exact", "f32")([x])[0]
    ours, stock = (float(abs(rows_graph(kind, floats)([x])[0] - exact).mean()) for kind in ("ours", "stock"))
    assert ours < 0.5 * stock, f"{ours:.1e} of {abs(exact).mean():.1f}, {stock:.1e} with OpenVINO's nodes"


def main() -> None:
    unusable = problem()
    if unusable:
        sys.exit(unusable.why)
    library, graphs, case = compiled(), 0, Case(64, 64)
    assert library
    data = inputs(case, 0.5)
    for variant in runnable():
        for floats in variant.floats:
            arrays = [to_bf16(x) for x in data] if floats == "bf16" else data
            found = compiled_graph(case, variant, floats, 2)([*(x[None] for x in data), case.bounds])[0][0]
            assert np.array_equal(found, Kernel(library).attend(variant.name, case, *arrays)), variant
            graphs += 1
    for floats in ("f32", "bf16"):
        if row_kernels(floats):
            compare_rows(floats)
            graphs += 1
    sys.stdout.write(f"{ov.__version__.partition('-')[0]} {graphs}\n")


if __name__ == "__main__":
    main()
