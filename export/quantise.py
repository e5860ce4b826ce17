"""Static int8 of the linear layers: ranges from calibration, outliers moved to where they cost nothing.

One calibration serves every engine: it runs the scorer's own description in torch and watches the input of each linear
layer. Activations get one symmetric scale per layer, weights one per output channel.

Outlier channels (SmoothQuant, Xiao et al. 2023) are smoothed only where the factors fold into weights that are there
anyway: attention mixes values channel by channel, so the factors of `o` go into the rows of `v`; the gated product is
linear in its gate, so those of `down` go into the rows of `gate`. The graph gets no extra node. The other linear layers
read a norm, which bounds their inputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ettin.runtimes.batch import Ids
from ettin.runtimes.graph import GraphForm, ModelShape, Scorer
from ettin.runtimes.graph.torch_graph import TorchOps

SMOOTHING = 0.5  # share of the difficulty that moves from activations to weights
_SMOOTHED = (("o", "v"), ("down", "gate"))
_LINEARS = ("q", "k", "v", "o", "up", "gate", "down")


@dataclass(frozen=True)
class Scheme:
    """What is quantised. The settings that an export tries, strongest first, are in `LADDER`.

    Args:
        name: for the manifest.
        float_linears: linear layers that stay in floating point.
        activations: False: weights only.
    """

    name: str
    float_linears: tuple[str, ...] = ()
    activations: bool = True


LADDER = (
    Scheme("all linear layers"),
    Scheme("all linear layers but the MLP's down projection", ("down",)),
    Scheme("weights only", activations=False),
)


@dataclass(frozen=True)
class Quantised:
    """Weights and what is known of their inputs.

    Args:
        weights: folded weights, float32, smoothed.
        input_max: by linear layer, the largest |input|; layers that are not in it stay in floating point.
        scheme: what is quantised.
    """

    weights: dict[str, Tensor]
    input_max: dict[str, float]
    scheme: Scheme


class _RangeOps(TorchOps):
    """Executes the graph and keeps the largest |input| of each channel of each linear layer."""

    def __init__(self, weights: Mapping[str, Tensor], channel_max: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self._channel_max = channel_max

    def linear(self, x: Tensor, name: str, bias: str | None = None) -> Tensor:
        seen = x.abs().reshape(-1, x.shape[-1]).amax(0)
        before = self._channel_max.get(name)
        self._channel_max[name] = seen if before is None else torch.maximum(before, seen)
        return super().linear(x, name, bias)


@torch.inference_mode()
def quantised(
    weights: Mapping[str, Tensor], shape: ModelShape, sequences: Iterable[Ids], scheme: Scheme = LADDER[0]
) -> Quantised:
    """Calibrates and smooths.

    Args:
        weights: what `fold.inference_weights` returns, float32.
        shape: the model's shape.
        sequences: token ids of the calibration pairs, int32 [its tokens] each.
        scheme: what is quantised.
    """
    channel_max: dict[str, Tensor] = {}
    ops = _RangeOps(weights, channel_max)
    for ids in sequences:
        row = torch.from_numpy(ids).long()[None]
        Scorer(ops, shape, GraphForm()).logits(row, torch.ones_like(row))
    smoothed = dict(weights)
    for layer in range(shape.num_layers):
        for name, source in _SMOOTHED:
            _smooth(smoothed, channel_max, f"layers.{layer}.{name}", f"layers.{layer}.{source}")
    chosen = [
        f"layers.{layer}.{name}" for layer in range(shape.num_layers) for name in _LINEARS
        if name not in scheme.float_linears
    ]  # fmt: skip
    return Quantised(smoothed, {name: float(channel_max[name].max()) for name in chosen}, scheme)


def _smooth(weights: dict[str, Tensor], channel_max: dict[str, Tensor], name: str, source: str) -> None:
    """Divides the inputs of `name` by factors, channel by channel, through the rows of `source`."""
    tiny = 1e-5
    inputs, columns = channel_max[name].clamp(min=tiny), weights[name].abs().amax(0).clamp(min=tiny)
    factors = inputs**SMOOTHING / columns ** (1 - SMOOTHING)
    factors = factors / factors.log().mean().exp()
    weights[name] = weights[name] * factors
    weights[source] = weights[source] / factors[:, None]
    channel_max[name] = channel_max[name] / factors


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as int8 (−127 … 127) and its scales, float32 [out, 1]."""
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return (weight / scales).round().clamp(-127, 127).to(torch.int8), scales
