"""int8 linear layers as ONNX nodes."""

from collections.abc import Sequence

import numpy as np
import torch

from ettin.export.onnx_graph import OnnxOps, Value
from ettin.export.quantise import Quantised, int8_rows

_ZERO = 128  # uint8 activations around 128 are int8 ones shifted: what ONNX Runtime's kernels prefer


class Int8OnnxOps(OnnxOps):
    """Writes QuantizeLinear / DequantizeLinear around the linear layers that `quantised` names.

    ONNX Runtime fuses each pair with its MatMul into an integer product.

    Args:
        quantised: smoothed weights and input ranges.
    """

    def __init__(self, quantised: Quantised) -> None:
        super().__init__({name: tensor.numpy() for name, tensor in quantised.weights.items()}, "float32")
        self._quantised = quantised
        self._inputs: dict[tuple[str, float], Value] = {}

    def linear(self, x: Value, name: str, bias: str | None = None) -> Value:
        if name not in self._quantised.input_max:
            return super().linear(x, name, bias)
        if self._quantised.scheme.activations:
            x = self._rounded(x, self._quantised.input_max[name])
        return self.node("MatMul", [x, self._int8(name)])

    def linears(self, x: Value, names: Sequence[str], joint: bool) -> list[Value]:
        return [self.linear(x, name) for name in names]

    def _rounded(self, x: Value, largest: float) -> Value:
        key = (x.name, largest)
        if key not in self._inputs:
            scale, zero = self.constant(np.array(largest / 127, np.float32)), self.constant(np.array(_ZERO, np.uint8))
            rounded = self.node("QuantizeLinear", [x, scale, zero], "uint8")
            self._inputs[key] = self.node("DequantizeLinear", [rounded, scale, zero], "float32")
        return self._inputs[key]

    def _int8(self, name: str) -> Value:
        """[in, out] as MatMul takes it, one scale for each output channel."""
        rows, scales = int8_rows(torch.from_numpy(self._weights[name]))
        stored = self.constant(rows.T.contiguous().numpy(), name)
        scale = self.constant(scales[:, 0].numpy(), f"{name}.scale")
        zero = self.constant(np.zeros(len(scales), np.int8), f"{name}.zero")
        return self.node("DequantizeLinear", [stored, scale, zero], "float32", axis=1)
