"""Where an `openvino` artifact spends its time, against what this machine's matrix units can do."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as op

from ettin.runtimes.batch import Batch
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime

_RUNS = 20
_PEAK_SIZES = (512, 1024, 2048)
_WEIGHTS = ("Constant", "Convert", "Multiply")  # what the second input of a linear layer's product comes from


@dataclass
class Part:
    """One kind of work.

    Args:
        milliseconds: spent in it.
        nodes: that ran.
        operations: multiplications and additions of its linear layers; 0 for anything else.
    """

    milliseconds: float = 0.0
    nodes: int = 0
    operations: float = 0.0


def profiled(runtime: OpenVinoRuntime, batch: Batch) -> dict[str, Part]:
    """The fastest of several inferences on one thread, by kind of work.

    Args:
        runtime: whose graph and precision are taken.
        batch: what is scored.

    Returns:
        By name, longest first: "int8 linear", "float linear", "attention", or OpenVINO's name of the node.
    """
    inputs, model = runtime.inputs(batch), runtime.model_for(batch.longest)
    parts = _best(_compiled(runtime.core(), model, runtime.precision_hint), inputs)
    model.reshape({each.any_name: list(array.shape) for each, array in zip(model.inputs, inputs, strict=True)})
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() in _WEIGHTS:
            kind = "int8 linear" if _is_int8(node) else "float linear"
            inner = node.input_value(0).get_shape()[-1]
            parts[kind].operations += 2.0 * inner * float(np.prod(node.output(0).get_shape()))
    return dict(sorted(parts.items(), key=lambda item: -item[1].milliseconds))


def _is_int8(matmul: ov.Node) -> bool:
    """Whether its input is rounded to 8 bits."""
    node = matmul.input_value(0).get_node()
    while node.get_type_name() in ("Transpose", "Reshape", "StridedSlice", "Slice"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _kind(entry: Any) -> str:
    if entry.node_type.startswith("FullyConnected"):
        return "int8 linear" if "8" in entry.exec_type.rsplit("_", 1)[-1] else "float linear"
    # OpenVINO fuses its own attention into a subgraph; the only operation that it has no kernel for is ours.
    return "attention" if entry.node_type in ("Subgraph", "Reference") else str(entry.node_type)


def _compiled(core: ov.Core, model: ov.Model, hint: str, threads: int = 1) -> ov.InferRequest:
    options = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    return core.compile_model(model, "CPU", options).create_infer_request()


def _best(request: ov.InferRequest, inputs: Sequence[NDArray[Any]]) -> dict[str, Part]:
    best: dict[str, Part] = {}
    for _ in range(_RUNS):
        request.infer(list(inputs))
        parts: dict[str, Part] = defaultdict(Part)
        for entry in request.profiling_info:
            milliseconds = 1000 * entry.real_time.total_seconds()
            if milliseconds:
                parts[_kind(entry)].milliseconds += milliseconds
                parts[_kind(entry)].nodes += 1
        if not best or _total(parts) < _total(best):
            best = parts
    return best


def _total(parts: dict[str, Part]) -> float:
    return sum(part.milliseconds for part in parts.values())


def peak_gops(hint: str, *, int8: bool, threads: int = 1) -> float:
    """The best of OpenVINO's square matrix products of several sizes, in 10⁹ operations per second.

    Args:
        hint: precision of what is not int8.
        int8: 8-bit inputs and weights.
        threads: that share each product.
    """
    return max(_product_gops(size, hint, int8, threads) for size in _PEAK_SIZES)


def _product_gops(size: int, hint: str, int8: bool, threads: int) -> float:
    rng = np.random.default_rng(0)
    x = op.parameter([size, size], ov.Type.f32)
    inner: ov.Node = x
    weight: ov.Node = op.constant(rng.standard_normal((size, size)).astype(np.float32))
    if int8:
        low, high = op.constant(np.float32(-4)), op.constant(np.float32(4 * 127 / 128))
        inner = op.fake_quantize(x, low, high, low, high, 256)
        rows = op.constant(rng.integers(-127, 128, (size, size)).astype(np.int8))
        weight = op.multiply(op.convert(rows, "f32"), op.constant(np.full((size, 1), 0.01, np.float32)))
    model = ov.Model([op.matmul(inner, weight, False, True)], [x])
    parts = _best(_compiled(ov.Core(), model, hint, threads), [rng.standard_normal((size, size)).astype(np.float32)])
    return 2.0 * size**3 / parts["int8 linear" if int8 else "float linear"].milliseconds / 1e6
