"""The primitive operations as OpenVINO nodes, with floating-point or int8 linear layers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset15 as op

from ettin.export.quantise import Quantised, int8_rows
from ettin.graph.ops import ONLY_IN_F32, SAME_WHEN_SHORT, Kind
from ettin.runtimes.engines.openvino_kernels import OPERATION

Weights = Mapping[str, NDArray[np.float32]]
StoreWeight = Callable[[NDArray[np.float32]], ov.Node]


def _integers(*values: int) -> ov.Node:
    return op.constant(np.array(values, np.int64))


def _float(value: float) -> ov.Node:
    return op.constant(np.float32(value))


class OpenVinoOps:
    """Writes float32 nodes; the precision that they run in is the runtime's hint.

    `store` writes the constant of a weight, and so decides the type that it is stored in.
    """

    def __init__(self, weights: Weights, store: StoreWeight) -> None:
        self._weights, self._store = weights, store
        self._stored: dict[str, ov.Node] = {}

    def weight(self, name: str) -> ov.Node:
        if name not in self._stored:
            store = op.constant if name.startswith("rope.") else self._store  # angles are not weights: they stay exact
            self._stored[name] = store(self._weights[name])
            self._stored[name].set_friendly_name(name)
        return self._stored[name]

    def integer(self, value: int) -> ov.Node:
        return op.constant(np.int64(value))

    def dim(self, x: ov.Node, axis: int) -> ov.Node:
        return op.gather(op.shape_of(x, "i64"), self.integer(axis), self.integer(0))

    def arange(self, count: ov.Node) -> ov.Node:
        return op.range(self.integer(0), count, self.integer(1), "i64")

    def cast(self, x: ov.Node, kind: Kind) -> ov.Node:
        return x if kind in ("compute", "float32") else op.convert(x, "i64")

    add, subtract, multiply, floor_divide = map(staticmethod, (op.add, op.subtract, op.multiply, op.divide))
    minimum, maximum, absolute = map(staticmethod, (op.minimum, op.maximum, op.absolute))

    def bias_where(self, a: ov.Node, b: ov.Node, bias: float) -> ov.Node:
        return op.select(op.greater(a, b), _float(bias), _float(0))

    def count_at_most(self, boundaries: ov.Node, values: ov.Node) -> ov.Node:
        return op.search_sorted(boundaries, values, right_mode=True)

    def _dims(self, dims: Sequence[int | ov.Node]) -> ov.Node:
        if all(isinstance(size, int) for size in dims):
            return _integers(*dims)
        parts = [_integers(size) if isinstance(size, int) else op.unsqueeze(size, self.integer(0)) for size in dims]
        return op.concat(parts, 0)

    def reshape(self, x: ov.Node, dims: Sequence[int | ov.Node]) -> ov.Node:
        return op.reshape(x, self._dims(dims), special_zero=True)

    def transpose(self, x: ov.Node, axes: Sequence[int]) -> ov.Node:
        return op.transpose(x, _integers(*axes))

    def gather(self, x: ov.Node, index: ov.Node, axis: int) -> ov.Node:
        return op.gather(x, index, self.integer(axis))

    def same_when_short(self, x: ov.Node) -> ov.Node:
        x.set_friendly_name(f"{SAME_WHEN_SHORT}{x.get_friendly_name()}")
        return x

    def first(self, x: ov.Node, count: ov.Node, axis: int) -> ov.Node:
        zero, one = _integers(0), _integers(1)
        return op.slice(x, zero, op.unsqueeze(count, self.integer(0)), one, _integers(axis))

    def pad_end(self, x: ov.Node, count: ov.Node, value: int) -> ov.Node:
        begin = _integers(0, 0)
        end = op.concat([_integers(0), op.unsqueeze(count, self.integer(0))], 0)
        return op.pad(x, begin, end, "constant", self.integer(value))

    def embedding(self, ids: ov.Node, name: str) -> ov.Node:
        return op.gather(self.weight(name), ids, self.integer(0))

    def linear(self, x: ov.Node, name: str) -> ov.Node:
        product, bias = op.matmul(x, self.weight(name), False, True), f"{name}.bias"
        product.set_friendly_name(f"{name}.matmul")
        return op.add(product, self.weight(bias)) if bias in self._weights or bias in self._stored else product

    def linears(self, x: ov.Node, names: Sequence[str], joint: bool) -> list[ov.Node]:
        if not joint:
            return [self.linear(x, name) for name in names]
        name = "+".join(names)
        for suffix in ("", ".bias"):
            if f"{name}{suffix}" not in self._stored and f"{names[0]}{suffix}" in self._weights:
                parts = [self._weights[f"{part}{suffix}"] for part in names]
                self._stored[f"{name}{suffix}"] = self._store(np.concatenate(parts))
        return list(op.split(self.linear(x, name), self.integer(-1), len(names)).outputs())

    def normalise(self, x: ov.Node, eps: float) -> ov.Node:
        return op.mvn(x, _integers(-1), True, eps, "inside_sqrt")

    def mean(self, x: ov.Node, members: ov.Node) -> ov.Node:
        return op.divide(op.matmul(members, x, False, False), op.reduce_sum(members, _integers(-1), True))

    def gelu(self, x: ov.Node) -> ov.Node:
        return op.gelu(x, "erf")

    def expand(self, x: ov.Node, dims: Sequence[int | ov.Node]) -> ov.Node:
        return op.broadcast(x, self._dims(dims))

    def rotate(self, x: ov.Node, cos: ov.Node, sin: ov.Node) -> ov.Node:
        # OpenVINO's RoPEFusionGPTNEOX and RoPEFusionPreprocess fuse a transpose and these nodes into one RoPE node.
        half = int(x.get_output_partial_shape(0)[-1].get_length()) // 2
        split = op.variadic_split(x, self.integer(3), _integers(half, half))
        turned = op.concat([op.multiply(split.output(1), _float(-1)), split.output(0)], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def attention(self, q: ov.Node, k: ov.Node, v: ov.Node, bias: ov.Node, reader: str) -> ov.Node:
        return self.mixed(op.scaled_dot_product_attention(q, k, v, bias, _float(1), causal=False), reader)

    def local_attention(self, q: ov.Node, k: ov.Node, v: ov.Node, bias: ov.Node, reader: str) -> ov.Node:
        raise NotImplementedError("OpenVINO graphs cut blocks before they rotate, see GraphForm.rotate_blocks")

    def global_attention(
        self, q: ov.Node, k: ov.Node, v: ov.Node, bias: ov.Node, blocks: ov.Node, reader: str
    ) -> ov.Node:
        return self.attention(q, k, v, bias, reader)

    def ragged_attention(
        self, q: ov.Node, k: ov.Node, v: ov.Node, cu_seqlens: ov.Node, heads: int, window: int, theta: float,
        first_only: bool, reader: str,
    ) -> ov.Node:  # fmt: skip
        # OpenVINO drops these conversions where the neighbours compute in bf16; the runtime does in f32.
        halves = [op.convert(x, "bf16") for x in (q, k, v)]
        attributes = {"heads": heads, "window": window, "theta": theta, "first_only": first_only}
        inputs = [x.output(0) for x in (*halves, cu_seqlens)]
        return self.mixed(op.convert(RaggedAttention(inputs, attributes), "f32"), reader)

    def mixed(self, values: ov.Node, reader: str) -> ov.Node:
        """What attention gives to `reader`, for subclasses that round it at its source."""
        return values


class RaggedAttention(ov.Op):  # type: ignore[misc]
    """The operation of our attention kernel, to write graphs with where the kernel itself can't run.

    `save` stores it under the name by which the kernel is known.
    """

    def __init__(self, inputs: list[ov.Output], attributes: dict[str, int | float | bool]) -> None:
        super().__init__(self)
        self._attributes = attributes
        self.set_arguments(inputs)
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, inputs: list[ov.Output]) -> "RaggedAttention":
        return RaggedAttention(inputs, self._attributes)

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes(self._attributes)
        return True


def save(model: ov.Model, path: Path) -> None:
    """Writes `path` and, beside it, the `.bin` of its constants."""
    # save_model stores weights as fp16 unless told otherwise.
    ov.save_model(model, path, compress_to_fp16=False)
    text = path.read_text(encoding="utf-8")
    named = text.replace(f'type="{OPERATION}" version="extension"', f'type="{OPERATION}" version="ettin"')
    path.write_text(named, encoding="utf-8")


class Int8OpenVinoOps(OpenVinoOps):
    """Writes FakeQuantize before the linear layers in `quantised`, whose weights are int8; `store` writes all others.

    OpenVINO turns these layers into int8 products that apply the scales as post-operations.
    """

    def __init__(self, quantised: Quantised, store: StoreWeight) -> None:
        super().__init__({name: tensor.numpy() for name, tensor in quantised.weights.items()}, store)
        self._quantised = quantised
        self._inputs: dict[tuple[str, float], ov.Node] = {}
        self._rounded_at_source: set[str] = set()

    def weight(self, name: str) -> ov.Node:
        if name not in self._quantised.input_max:
            return super().weight(name)
        rows, scales = int8_rows(torch.from_numpy(self._weights[name]))
        return op.multiply(op.convert(op.constant(rows.numpy()), "f32"), op.constant(scales.numpy()))

    def linear(self, x: ov.Node, name: str) -> ov.Node:
        is_rounded = name in self._quantised.input_max and self._quantised.scheme.activations
        if is_rounded and name not in self._rounded_at_source:
            x = self._rounded(x, self._quantised.input_max[name])
        return super().linear(x, name)

    def linears(self, x: ov.Node, names: Sequence[str], joint: bool) -> list[ov.Node]:
        # OpenVINO fuses activations only into separate int8 products. A group is left out of int8 as a whole.
        return super().linears(x, names, joint and names[0] not in self._quantised.input_max)

    def attention(self, q: ov.Node, k: ov.Node, v: ov.Node, bias: ov.Node, reader: str) -> ov.Node:
        """Rounds queries, keys and the result: OpenVINO fuses the rounding into the attention kernel.

        Measured with the 17m shape on one core: rounding the result, whose transpose then moves bytes, saves 4 % of the
        whole graph in bf16 and 3 % in f32. Rounding queries and keys saves 7 % in f32 (AVX2-VNNI) and costs time in
        bf16, where `OpenVinoRuntime` leaves it out.
        """
        if reader in self._quantised.attention_max:
            q, k = (
                self._rounded(x, largest, ONLY_IN_F32)
                for x, largest in zip((q, k), self._quantised.attention_max[reader], strict=True)
            )
        return super().attention(q, k, v, bias, reader)

    def mixed(self, values: ov.Node, reader: str) -> ov.Node:
        if reader not in self._quantised.input_max or not self._quantised.scheme.activations:
            return values
        self._rounded_at_source.add(reader)
        return self._rounded(values, self._quantised.input_max[reader])

    def _rounded(self, x: ov.Node, largest: float, mark: str = "") -> ov.Node:
        """One FakeQuantize for all readers of a value: signed, symmetric, 256 levels."""
        key = (x.get_friendly_name(), largest)
        if key not in self._inputs:
            low, high = _float(-largest), _float(largest * 127 / 128)
            node = op.fake_quantize(x, low, high, low, high, 256)
            node.set_friendly_name(mark + node.get_friendly_name())
            self._inputs[key] = node
        return self._inputs[key]
