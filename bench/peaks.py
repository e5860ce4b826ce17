"""How much of a machine's arithmetic is used: the work of a pair, the fastest matrix products, and where time goes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ettin.graph import ModelShape
from ettin.runtimes.batch import Batch
from ettin.runtimes.machine import available_cpus, has_bf16

_CPU_SIZES, _GPU_SIZE = (512, 1024, 2048), 8192
_OWN_KINDS = {
    "RaggedAttention": "attention",
    "FirstAttention": "attention",
    "AddedNorm": "residual and norm",
    "GatedGelu": "gate",
}
_WEIGHTS = ("Constant", "Convert", "Multiply")  # what the second input of a linear layer's product comes from


def pair_flops(shape: ModelShape, tokens: int) -> float:
    """Multiplications and additions that the published model needs for a pair, whatever a graph saves or wastes.

    Linear layers on real tokens; attention on the keys that a query sees; embedding, norms and head are left out.
    """
    hidden, layers = shape.hidden_size, shape.num_layers
    linear = 2.0 * tokens * layers * (4 * hidden**2 + 3 * hidden * shape.intermediate_size)
    reach = min(shape.window_tokens, tokens - 1) if tokens else 0
    local = float(tokens + 2 * (reach * tokens - reach * (reach + 1) // 2))
    seen = {True: float(tokens) * tokens, False: local}
    return linear + sum(4.0 * hidden * seen[is_global] for is_global in shape.global_layers)


def cpu_peaks() -> dict[str, float]:
    """Fastest matrix product by precision, in 10⁹ operations per second on all cores; empty without OpenVINO."""
    try:
        import openvino  # noqa: F401
    except ModuleNotFoundError:
        return {}
    precisions = {"fp32": ("f32", False), "int8": ("f32", True)} | ({"bf16": ("bf16", False)} if has_bf16() else {})
    threads = available_cpus()
    return {name: peak_gops(hint, int8=int8, threads=threads) for name, (hint, int8) in precisions.items()}


def gpu_peaks() -> dict[str, float]:
    """Fastest product of large matrices on the GPU by precision, in 10⁹ operations per second."""
    import torch
    from torch.utils.benchmark import Timer

    peaks = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.randn(_GPU_SIZE, _GPU_SIZE, device="cuda", dtype=dtype)
        seconds = Timer("matrix @ matrix", globals={"matrix": matrix}).blocked_autorange().times
        peaks[name] = 2 * _GPU_SIZE**3 / min(seconds) / 1e9
    return peaks


@dataclass
class Part:
    """One kind of work."""

    milliseconds: float = 0.0
    nodes: int = 0  # that ran
    operations: float = 0.0  # multiplications and additions of its linear layers; 0 for anything else


def profile_figures(runtime: Any, batch: Batch) -> dict[str, Any]:
    """Where an OpenVINO runtime spends the time of one batch, and linear layers as shares of the peak of one core."""
    hint, parts = runtime.precision_hint, profiled(runtime, batch)
    peaks = {"int8 linear": peak_gops(hint, int8=True), "float linear": peak_gops(hint, int8=False)}
    rows: list[dict[str, Any]] = [{"part": name, **asdict(part)} for name, part in parts.items()]
    for row in rows:
        row["gops"] = row["operations"] / row["milliseconds"] / 1e6
        row["share_of_peak"] = row["gops"] / peaks[row["part"]] if row["gops"] else None
    return {"peak_gops": peaks, "milliseconds": _total_ms(parts), "parts": rows}


def profiled(runtime: Any, batch: Batch) -> dict[str, Part]:
    """The fastest of several inferences on one thread by kind of work, longest first.

    A kind is "int8 linear", "float linear", "attention", "residual and norm", "gate", "others", or OpenVINO's
    name of the node.
    """
    inputs, model = runtime.inputs(batch), runtime.model_for(batch.longest)
    parts = _fastest(_compiled(runtime.core(), model, runtime.precision_hint), inputs)
    model.reshape({port: list(array.shape) for port, array in zip(model.inputs, inputs, strict=True)})
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() in _WEIGHTS:
            kind = "int8 linear" if _is_int8(node) else "float linear"
            inner = node.input_value(0).get_shape()[-1]
            parts[kind].operations += 2.0 * inner * float(np.prod(node.output(0).get_shape()))
    return dict(sorted(parts.items(), key=lambda item: -item[1].milliseconds))


def peak_gops(hint: str, *, int8: bool, threads: int = 1) -> float:
    """The best of OpenVINO's square matrix products of several sizes, in 10⁹ operations per second.

    The hint is the precision of what is not int8: "f32" or "bf16".
    """
    return max(_product_gops(size, hint, int8, threads) for size in _CPU_SIZES)


def _product_gops(size: int, hint: str, int8: bool, threads: int) -> float:
    import openvino as ov
    from openvino import opset15 as op

    rng = np.random.default_rng(0)
    x = op.parameter([size, size], ov.Type.f32)
    inner: Any = x
    weight: Any = op.constant(rng.standard_normal((size, size)).astype(np.float32))
    if int8:
        low, high = op.constant(np.float32(-4)), op.constant(np.float32(4 * 127 / 128))
        inner = op.fake_quantize(x, low, high, low, high, 256)
        rows = op.constant(rng.integers(-127, 128, (size, size)).astype(np.int8))
        weight = op.multiply(op.convert(rows, "f32"), op.constant(np.full((size, 1), 0.01, np.float32)))
    model = ov.Model([op.matmul(inner, weight, False, True)], [x])
    inputs = [rng.standard_normal((size, size)).astype(np.float32)]
    parts = _fastest(_compiled(ov.Core(), model, hint, threads), inputs)
    return 2.0 * size**3 / parts["int8 linear" if int8 else "float linear"].milliseconds / 1e6


def _is_int8(matmul: Any) -> bool:
    """Whether its input is rounded to 8 bits."""
    node = matmul.input_value(0).get_node()
    while node.get_type_name() in ("Transpose", "Reshape", "StridedSlice", "Slice", "Multiply", "Convert"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize" or node.get_output_element_type(0).get_type_name() == "i8")


def _kind(entry: Any) -> str:
    if entry.node_type.startswith("FullyConnected"):
        return "int8 linear" if "8" in entry.exec_type.rsplit("_", 1)[-1] else "float linear"
    if entry.node_type == "Reference":  # OpenVINO has no kernel for it: an operation of ours
        return _OWN_KINDS.get(entry.node_name.partition("_")[0], "others")
    # OpenVINO fuses its own attention into a subgraph.
    return "attention" if entry.node_type == "Subgraph" else str(entry.node_type)


def _compiled(core: Any, model: Any, hint: str, threads: int = 1) -> Any:
    options = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    return core.compile_model(model, "CPU", options).create_infer_request()


def _fastest(request: Any, inputs: Sequence[NDArray[Any]]) -> dict[str, Part]:
    best: dict[str, Part] = {}
    for _ in range(20):
        request.infer(list(inputs))
        parts: dict[str, Part] = defaultdict(Part)
        for entry in request.profiling_info:
            milliseconds = 1000 * entry.real_time.total_seconds()
            if milliseconds:
                parts[_kind(entry)].milliseconds += milliseconds
                parts[_kind(entry)].nodes += 1
        if not best or _total_ms(parts) < _total_ms(best):
            best = parts
    return best


def _total_ms(parts: dict[str, Part]) -> float:
    return sum(part.milliseconds for part in parts.values())
