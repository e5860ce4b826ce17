"""int8 linear layers as OpenVINO nodes."""

from collections.abc import Sequence

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as op

from ettin.export.openvino_graph import OpenVinoOps, StoreWeight
from ettin.export.quantise import Quantised, int8_rows
from ettin.runtimes.graph.ops import ONLY_IN_F32


class Int8OpenVinoOps(OpenVinoOps):
    """Writes FakeQuantize before and int8 weights inside the linear layers that `quantised` names.

    OpenVINO turns these into int8 products that take the scales along as post-operations.

    Args:
        quantised: smoothed weights and input ranges.
        store: writes the constant of any other weight.
    """

    def __init__(self, quantised: Quantised, store: StoreWeight) -> None:
        super().__init__({name: tensor.numpy() for name, tensor in quantised.weights.items()}, store)
        self._quantised = quantised
        self._inputs: dict[tuple[str, float], ov.Node] = {}
        self._rounded_at_source: set[str] = set()

    def linear(self, x: ov.Node, name: str, bias: str | None = None) -> ov.Node:
        if name not in self._quantised.input_max:
            return super().linear(x, name, bias)
        if self._quantised.scheme.activations and name not in self._rounded_at_source:
            x = self._rounded(x, self._quantised.input_max[name])
        product = op.matmul(x, self._int8(name), False, True)
        product.set_friendly_name(f"{name}.matmul")
        return product

    def linears(self, x: ov.Node, names: Sequence[str], joint: bool) -> list[ov.Node]:
        # int8 products fuse their activations only when apart; a group is left out of int8 together.
        return super().linears(x, names, joint and names[0] not in self._quantised.input_max)

    def attention(self, q: ov.Node, k: ov.Node, v: ov.Node, bias: ov.Node, reader: str) -> ov.Node:
        """Queries, keys and the result are rounded: OpenVINO fuses it all into the attention kernel.

        Measured with the 17m shape on one core: the rounded result, whose transpose then moves bytes, takes 4 % off the
        whole graph in bf16 and 3 % in f32; rounded queries and keys take 7 % off in f32 (AVX2-VNNI), and add to it in
        bf16, where `OpenVinoRuntime` leaves them out.
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
            low = op.constant(np.float32(-largest))
            high = op.constant(np.float32(largest * 127 / 128))
            node = op.fake_quantize(x, low, high, low, high, 256)
            node.set_friendly_name(mark + node.get_friendly_name())
            self._inputs[key] = node
        return self._inputs[key]

    def _int8(self, name: str) -> ov.Node:
        rows, scales = int8_rows(torch.from_numpy(self._weights[name]))
        return op.multiply(op.convert(op.constant(rows.numpy()), "f32"), op.constant(scales.numpy()))
