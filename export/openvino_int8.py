"""int8 linear layers as OpenVINO nodes."""

from collections.abc import Sequence

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as op

from ettin.export.openvino_graph import OpenVinoOps, StoreWeight
from ettin.export.quantise import Quantised, int8_rows


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

    def linear(self, x: ov.Node, name: str, bias: str | None = None) -> ov.Node:
        if name not in self._quantised.input_max:
            return super().linear(x, name, bias)
        if self._quantised.scheme.activations:
            x = self._rounded(x, self._quantised.input_max[name])
        product = op.matmul(x, self._int8(name), False, True)
        product.set_friendly_name(f"{name}.matmul")
        return product

    def linears(self, x: ov.Node, names: Sequence[str], joint: bool) -> list[ov.Node]:
        return [self.linear(x, name) for name in names]  # int8 products fuse their activations only when apart

    def _rounded(self, x: ov.Node, largest: float) -> ov.Node:
        """One FakeQuantize for all readers of a value: signed, symmetric, 256 levels."""
        key = (x.get_friendly_name(), largest)
        if key not in self._inputs:
            low = op.constant(np.full((1, 1, 1), -largest, np.float32))
            high = op.constant(np.full((1, 1, 1), largest * 127 / 128, np.float32))
            self._inputs[key] = op.fake_quantize(x, low, high, low, high, 256)
        return self._inputs[key]

    def _int8(self, name: str) -> ov.Node:
        rows, scales = int8_rows(torch.from_numpy(self._weights[name]))
        return op.multiply(op.convert(op.constant(rows.numpy()), "f32"), op.constant(scales.numpy()))
