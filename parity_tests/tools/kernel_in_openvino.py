"""The attention kernel in a graph of whatever OpenVINO this process imports, against the same call without an engine.

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
from ettin.runtimes.engines.on_openvino import set_attention
from ettin.runtimes.engines.openvino_kernels import Variant, compiled, problem, runnable


def compiled_graph(case: Case, variant: Variant, floats: str, threads: int = 1) -> ov.CompiledModel:
    """Attention alone, written to a file and read again. It takes queries, keys, values [1, tokens, H] and bounds."""
    tensors = [op.parameter([1, -1, HEADS * case.head_dim], ov.Type.f32) for _ in "qkv"]
    bounds = op.parameter([-1], ov.Type.i64)
    mixed = OpenVinoOps({}, op.constant).ragged_attention(
        *tensors, bounds, HEADS, case.window, THETA, case.first_only, ""
    )
    core = ov.Core()
    core.add_extension(str(compiled()))
    with TemporaryDirectory() as folder:
        save(ov.Model([mixed], [*tensors, bounds]), Path(folder) / "model.xml")
        model = core.read_model(Path(folder) / "model.xml")
    set_attention(model, variant, floats)
    options = {"INFERENCE_PRECISION_HINT": floats, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    return core.compile_model(model, "CPU", options)


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
    sys.stdout.write(f"{ov.__version__.partition('-')[0]} {graphs}\n")


if __name__ == "__main__":
    main()
