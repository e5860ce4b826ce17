"""The primitive operations as ONNX nodes, with floating-point or int8 linear layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (registers numpy's bfloat16)
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ettin.export.quantise import Quantised, int8_rows
from ettin.graph.ops import Kind

OPSET = 20  # the first with Gelu; ONNX Runtime reads it from 1.17 on


class Value(NamedTuple):
    """A tensor of the graph: its name and element type."""

    name: str
    dtype: str


def _element(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _elementwise(kind: str) -> Callable[..., Value]:
    """A method that adds one node of this kind."""

    def operation(self: "OnnxOps", *inputs: Value) -> Value:
        return self.node(kind, inputs)

    return operation


class OnnxOps:
    """Collects nodes and initializers.

    Linear layers and attention are computed in "float32", "float16" or "bfloat16", norms and the head in float32. With
    "bfloat16", which keeps 8 bits, rotation, softmax and GELU are float32 as well, between casts: a compiler fuses
    these away (TensorRT-RTX 1.7 does, seen in its layer listing).
    """

    def __init__(self, weights: Mapping[str, NDArray[np.float32]], compute: str) -> None:
        self._weights, self._compute = weights, compute
        self._is_bfloat16 = compute == "bfloat16"
        self._names = 0
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def node(self, kind: str, inputs: Sequence[Value], dtype: str | None = None, **attributes: Any) -> Value:
        """Adds a node with one output, of the first input's type unless told otherwise."""
        return self._nodes(kind, inputs, dtype or inputs[0].dtype, 1, **attributes)[0]

    def _nodes(self, kind: str, inputs: Sequence[Value], dtype: str, outputs: int, **attributes: Any) -> list[Value]:
        name = self._new_name(kind)
        names = [f"{name}:{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, [value.name for value in inputs], names, name, **attributes))
        return [Value(output, dtype) for output in names]

    def _new_name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}_{self._names}"

    def _subgraph(self, write: Callable[..., Sequence[Value]], *inputs: Value) -> onnx.GraphProto:
        """A graph of what `write` returns for scalar `inputs`; it may read values and weights of the outer graph."""
        outer, self.nodes = self.nodes, []
        results = write(*inputs)
        nodes, self.nodes = self.nodes, outer
        return helper.make_graph(
            nodes,
            self._new_name("subgraph"),
            [helper.make_tensor_value_info(value.name, _element(value.dtype), []) for value in inputs],
            [helper.make_tensor_value_info(value.name, _element(value.dtype), None) for value in results],
        )

    def constant(self, values: NDArray[Any], name: str | None = None) -> Value:
        """Adds an initializer; equal small constants share one."""
        name = name or f"const:{values.dtype}:{values.tolist()}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return Value(name, str(values.dtype))

    def weight(self, name: str) -> Value:
        return self._stored(name, self._weights[name])

    def _stored(self, name: str, values: NDArray[np.float32]) -> Value:
        is_float32 = name.startswith("head.") or (name.startswith("rope.") and self._is_bfloat16)
        return self.constant(values.astype(np.dtype("float32" if is_float32 else self._compute), copy=False), name)

    def integer(self, value: int) -> Value:
        return self.constant(np.array(value, np.int64))

    def _integers(self, *values: int) -> Value:
        return self.constant(np.array(values, np.int64))

    def dim(self, x: Value, axis: int) -> Value:
        length = self.node("Shape", [x], "int64", start=axis, end=axis + 1)
        return self.node("Squeeze", [length, self._integers(0)])

    def arange(self, count: Value) -> Value:
        return self.node("Range", [self.integer(0), count, self.integer(1)])

    def cast(self, x: Value, kind: Kind) -> Value:
        dtype = {"int": "int64", "compute": self._compute, "float32": "float32"}[kind]
        return x if x.dtype == dtype else self.node("Cast", [x], dtype, to=_element(dtype))

    add, subtract, multiply, floor_divide = map(_elementwise, ("Add", "Sub", "Mul", "Div"))
    minimum, maximum, absolute = map(_elementwise, ("Min", "Max", "Abs"))

    def bias_where(self, a: Value, b: Value, bias: float) -> Value:
        dtype = "float32" if self._is_bfloat16 else self._compute
        chosen, zero = (self.constant(np.array(value, dtype)) for value in (bias, 0.0))
        return self.node("Where", [self.node("Greater", [a, b], "bool"), chosen, zero], dtype)

    def count_at_most(self, boundaries: Value, values: Value) -> Value:
        columns, rows = self.reshape(boundaries, [1, -1]), self.reshape(values, [-1, 1])
        is_at_most = self.cast(self.node("LessOrEqual", [columns, rows], "bool"), "int")
        return self.node("ReduceSum", [is_at_most, self._integers(1)], keepdims=0)

    def _dims(self, dims: Sequence[int | Value]) -> Value:
        sizes = [size for size in dims if isinstance(size, int)]
        if len(sizes) == len(dims):
            return self._integers(*sizes)
        parts = [self._integers(size) if isinstance(size, int) else self._unsqueezed(size) for size in dims]
        return self.node("Concat", parts, axis=0)

    def _unsqueezed(self, scalar: Value) -> Value:
        return self.node("Unsqueeze", [scalar, self._integers(0)])

    def reshape(self, x: Value, dims: Sequence[int | Value]) -> Value:
        return self.node("Reshape", [x, self._dims(dims)])

    def expand(self, x: Value, dims: Sequence[int | Value]) -> Value:
        return self.node("Expand", [x, self._dims(dims)])

    def transpose(self, x: Value, axes: Sequence[int]) -> Value:
        return self.node("Transpose", [x], perm=list(axes))

    def gather(self, x: Value, index: Value, axis: int) -> Value:
        return self.node("Gather", [x, index], axis=axis)

    def same_when_short(self, x: Value) -> Value:
        return x

    def first(self, x: Value, count: Value, axis: int) -> Value:
        end = self._unsqueezed(count)
        return self.node("Slice", [x, self._integers(0), end, self._integers(axis)])

    def pad_end(self, x: Value, count: Value, value: int) -> Value:
        pads = self.node("Concat", [self._integers(0, 0, 0), self._dims([count])], axis=0)
        return self.node("Pad", [x, pads, self.integer(value)], mode="constant")

    def embedding(self, ids: Value, name: str) -> Value:
        return self.node("Gather", [self.weight(name), ids], axis=0)

    def linear(self, x: Value, name: str) -> Value:
        product, bias = self.node("MatMul", [x, self._matrix(name)]), f"{name}.bias"
        return self.add(product, self.weight(bias)) if bias in self._weights else product

    def _matrix(self, name: str) -> Value:
        """A weight as MatMul takes it: [in, out]."""
        return self._stored(name, self._weights[name].T)

    def linears(self, x: Value, names: Sequence[str], joint: bool) -> list[Value]:
        if joint:
            raise NotImplementedError("ONNX graphs keep split projections")
        return [self.linear(x, name) for name in names]

    def normalise(self, x: Value, eps: float) -> Value:
        wide = self.cast(x, "float32")
        ones = self.constant(np.ones(self._weights["embedding"].shape[1], np.float32), "norm.ones")
        return self._back(self.node("LayerNormalization", [wide, ones], axis=-1, epsilon=eps), x)

    def mean(self, x: Value, members: Value) -> Value:
        counts = self.node("ReduceSum", [members, self._integers(-1)], keepdims=1)
        return self.node("Div", [self.node("MatMul", [members, x]), counts])

    def gelu(self, x: Value) -> Value:
        return self._back(self.node("Gelu", [self._widened(x)], approximate="none"), x)

    def _widened(self, x: Value) -> Value:
        return self.cast(x, "float32") if self._is_bfloat16 else x

    def _back(self, result: Value, x: Value) -> Value:
        """`result` in the type of `x`."""
        return result if result.dtype == x.dtype else self.cast(result, "compute")

    def rotate(self, x: Value, cos: Value, sin: Value) -> Value:
        wide = self._widened(x)
        left, right = self._nodes("Split", [wide], wide.dtype, 2, axis=-1, num_outputs=2)
        turned = self.node("Concat", [self.node("Neg", [right]), left], axis=-1)
        return self._back(self.add(self.multiply(wide, cos), self.multiply(turned, sin)), x)

    def attention(self, q: Value, k: Value, v: Value, bias: Value, reader: str) -> Value:
        return self._mixed(q, self.transpose(k, [0, 1, 3, 2]), v, bias)

    def local_attention(self, q: Value, k: Value, v: Value, bias: Value, reader: str) -> Value:
        return self._mixed(q, self.transpose(k, [0, 1, 2, 4, 3]), v, bias)

    def _mixed(self, q: Value, keys: Value, v: Value, bias: Value) -> Value:
        """Attention whose keys are transposed: [..., d, tokens]."""
        scores = self._widened(self.node("MatMul", [q, keys]))
        shares = self.node("Softmax", [self.add(scores, bias)], axis=-1)
        return self.node("MatMul", [self._back(shares, q), v])

    def global_attention(self, q: Value, k: Value, v: Value, bias: Value, blocks: Value, reader: str) -> Value:
        def at_once() -> list[Value]:
            return [self.attention(q, k, v, bias, reader)]

        def block_by_block() -> list[Value]:
            head_dim = self.dim(q, 3)
            by_block = self.transpose(self.reshape(q, [0, 0, blocks, -1, head_dim]), [2, 0, 1, 3, 4])

            def one_block(index: Value, go_on: Value) -> list[Value]:
                queries = self.gather(by_block, index, 0)
                return [self.node("Identity", [go_on]), self.attention(queries, k, v, bias, reader)]

            index, go_on = Value(self._new_name("index"), "int64"), Value(self._new_name("go_on"), "bool")
            body = self._subgraph(one_block, index, go_on)
            mixed = self.node("Loop", [blocks, Value("", "bool")], q.dtype, body=body)
            return [self.reshape(self.transpose(mixed, [1, 2, 0, 3, 4]), [0, 0, -1, head_dim])]

        # A runtime executes the branch taken alone. OpenVINO 2026.4 can't read a Scan whose body uses outer values.
        return self.node(
            "If",
            [self.node("Greater", [blocks, self.integer(1)], "bool")],
            q.dtype,
            then_branch=self._subgraph(block_by_block),
            else_branch=self._subgraph(at_once),
        )


_ZERO = 128  # activations are int8 values shifted by 128, in uint8, which ONNX Runtime's kernels prefer


class Int8OnnxOps(OnnxOps):
    """Writes QuantizeLinear and DequantizeLinear before the inputs and weights of the linear layers in `quantised`.

    ONNX Runtime fuses them with the MatMul between into an integer product.
    """

    def __init__(self, quantised: Quantised) -> None:
        super().__init__({name: tensor.numpy() for name, tensor in quantised.weights.items()}, "float32")
        self._quantised = quantised
        self._inputs: dict[tuple[str, float], Value] = {}

    def embedding(self, ids: Value, name: str) -> Value:
        """Rows of int8, each with a scale: the table is most of a small model's file, which browsers download."""
        rows, scales = (
            self.constant(part.numpy(), key)
            for part, key in zip(int8_rows(torch.from_numpy(self._weights[name])), (name, f"{name}.scale"), strict=True)
        )
        values = self.cast(self.node("Gather", [rows, ids], axis=0), "float32")
        return self.multiply(values, self.node("Gather", [scales, ids], axis=0))

    def linear(self, x: Value, name: str) -> Value:
        if name in self._quantised.input_max and self._quantised.scheme.activations:
            x = self._rounded(x, self._quantised.input_max[name])
        return super().linear(x, name)

    def _rounded(self, x: Value, largest: float) -> Value:
        key = (x.name, largest)
        if key not in self._inputs:
            scale, zero = self.constant(np.array(largest / 127, np.float32)), self.constant(np.array(_ZERO, np.uint8))
            rounded = self.node("QuantizeLinear", [x, scale, zero], "uint8")
            self._inputs[key] = self.node("DequantizeLinear", [rounded, scale, zero], "float32")
        return self._inputs[key]

    def _matrix(self, name: str) -> Value:
        if name not in self._quantised.input_max:
            return super()._matrix(name)
        rows, scales = int8_rows(torch.from_numpy(self._weights[name]))
        stored = self.constant(rows.T.contiguous().numpy(), name)
        scale = self.constant(scales[:, 0].numpy(), f"{name}.scale")
        zero = self.constant(np.zeros(len(scales), np.int8), f"{name}.zero")
        return self.node("DequantizeLinear", [stored, scale, zero], "float32", axis=1)
