"""Static int8 of the linear layers: ranges from calibration texts, outliers moved to where they cost nothing.

The calibration texts are never those that an artifact is judged on. One calibration serves every engine: it runs the
scorer's own description in torch and watches the input of each linear layer. Activations get one symmetric scale per
layer, weights one per output channel. Where our kernels for OpenVINO round norms and gated products, each token has a
scale.

Outlier channels are smoothed (SmoothQuant, Xiao et al. 2023) only where the factors fold into existing weights, so that
the graph gets no extra node. Attention mixes values channel by channel: the factors of `o` go into the rows of `v`. The
gated product is linear in its gate: those of `down` go into the rows of `gate`. The other linear layers read a norm,
which bounds their inputs. In the same way queries and keys are brought to one size, with one factor for two channels
that RoPE rotates together: their product does not change, and both round well.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ettin.artifacts.errors import InputError
from ettin.export.proof_pairs import read_pairs, read_passages
from ettin.graph import GraphForm, ModelShape, Scorer
from ettin.graph.torch_ops import TorchOps
from ettin.runtimes.batch import Ids
from ettin.runtimes.tokenizer import PairTokenizer

_OWN = Path(__file__).parent / "calibration.jsonl"
_OFFSETS = (0, 3, 8, 15)  # a question is paired with its own passage and three others
_MIN_PAIRS = 32
_SENSITIVITY_PAIRS = 16
_SMOOTHING = 0.5  # share of the difficulty that moves from activations to weights
_SMOOTHED = (("o", "v"), ("down", "gate"))
# Linear layers that read the same input, or the same intermediate result, are left out together.
_GROUPS = (("q", "k", "v"), ("o",), ("up", "gate"), ("down",))


@dataclass(frozen=True)
class CalibrationText:
    """Real query–document pairs, from short to long."""

    pairs: list[tuple[str, str]]
    name: str  # of the file
    sha256: str  # of the file

    def sequences(self, tokenizer: PairTokenizer, max_length: int) -> list[Ids]:
        """Token ids of the pairs, int32 [its tokens] each."""
        return tokenizer.pairs(self.pairs, max_length)


def calibration_text(file: Path | None = None) -> CalibrationText:
    """The project's own calibration text, or the user's.

    The project's 24 passages are not those of the proof pairs. They are paired with questions one by one (96 pairs)
    and, for long inputs, joined in fours and eights (9 pairs). The user's are JSON lines, see `read_pairs`.

    Raises:
        InputError: the user's file is not in this form, or too short to calibrate on.
    """
    if file is not None:
        pairs = [(pair.query, pair.document) for pair in read_pairs(file)]
        if len(pairs) < _MIN_PAIRS:
            raise InputError(f"{file}: {len(pairs)} pairs, expected at least {_MIN_PAIRS} to calibrate on")
        return CalibrationText(pairs, file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    rows = read_passages(_OWN)
    questions, texts = [row["question"] for row in rows], [row["text"] for row in rows]
    pairs = [
        (question, texts[(index + step) % len(texts)]) for index, question in enumerate(questions) for step in _OFFSETS
    ]
    for size in (4, 8):
        pairs += [(questions[start], " ".join(texts[start : start + size])) for start in range(0, len(texts), size)]
    return CalibrationText(pairs, "ettin-export/calibration.jsonl", hashlib.sha256(_OWN.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Scheme:
    """What is quantised."""

    name: str  # in the manifest
    # Share of the groups of linear layers that stay in floating point: those with the largest `group_errors`.
    float_share: float = 0.0
    activations: bool = True  # False: weights only
    scores: bool = False  # whether queries and keys are rounded, too, so that attention scores can be int8 products


# What an export tries until the scores are good enough, strongest first.
LADDER = (
    Scheme("all linear layers, and attention scores where the engine gains by it", scores=True),
    Scheme("all linear layers but the most sensitive eighth", 1 / 8),
    Scheme("all linear layers but the most sensitive third", 1 / 3),
    Scheme("weights only", activations=False),
)


@dataclass(frozen=True)
class Quantised:
    """Smoothed weights and the ranges of what is rounded. What has no range stays in floating point."""

    weights: dict[str, Tensor]  # folded, float32
    input_max: dict[str, float]  # by linear layer: the largest |input|
    attention_max: dict[str, tuple[float, float]]  # by the layer that reads an attention: the largest |query|, |key|
    scheme: Scheme


class Quantiser:
    """Calibrates a model on the token ids of pairs, once, and quantises it by any scheme."""

    def __init__(self, weights: Mapping[str, Tensor], shape: ModelShape, sequences: Sequence[Ids]) -> None:
        by_length = sorted(sequences, key=len)
        self._sample = by_length[:: max(1, len(by_length) // _SENSITIVITY_PAIRS)]  # each group takes a pass over it
        self._shape, self._weights, ops = shape, dict(weights), _RangeOps(weights)
        _logits(ops, shape, sequences)
        self._channel_max = ops.channel_max
        for layer in range(shape.num_layers):
            for name, source in _SMOOTHED:
                _smooth(self._weights, self._channel_max, f"layers.{layer}.{name}", f"layers.{layer}.{source}")
        self._input_max = {name: float(self._channel_max[name].max()) for name in linear_layers(shape)}

    def quantised(self, scheme: Scheme) -> Quantised:
        """Smoothed weights and the ranges of what `scheme` quantises."""
        weights, channel_max = dict(self._weights), dict(self._channel_max)
        attention_max = {}
        for layer in range(self._shape.full_layers) if scheme.scores else ():
            reader = f"layers.{layer}.o"
            _balance(weights, channel_max, f"layers.{layer}", self._shape)
            attention_max[reader] = (
                float(channel_max[f"{reader}.queries"].max()),
                float(channel_max[f"{reader}.keys"].max()),
            )
        left_out: set[str] = set()
        if scheme.float_share:
            worst = sorted(self._group_errors, key=lambda group: self._group_errors[group], reverse=True)
            left_out = {name for group in worst[: math.ceil(scheme.float_share * len(worst))] for name in group}
        input_max = {name: largest for name, largest in self._input_max.items() if name not in left_out}
        return Quantised(weights, input_max, attention_max, scheme)

    @cached_property
    def _group_errors(self) -> dict[tuple[str, ...], float]:
        return group_errors(self._weights, self._input_max, self._shape, self._sample)


class _RangeOps(TorchOps):
    """Executes the graph and keeps the largest |value| of each channel of what is rounded.

    `channel_max` has the input of a linear layer under its name, [in]. It has the queries and keys of an attention
    under the name of the layer that reads its result and ".queries" or ".keys", [H].
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.channel_max: dict[str, Tensor] = {}

    def linear(self, x: Tensor, name: str) -> Tensor:
        self._note(x, name)
        return super().linear(x, name)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, reader: str) -> Tensor:
        for x, name in ((q, "queries"), (k, "keys")):
            self._note(x.movedim(1, -2).flatten(-2), f"{reader}.{name}")
        return super().attention(q, k, v, bias, reader)

    def _note(self, x: Tensor, name: str) -> None:
        largest = x.abs().reshape(-1, x.shape[-1]).amax(0)
        before = self.channel_max.get(name, largest)
        self.channel_max[name] = torch.maximum(before, largest)


class _RoundingOps(TorchOps):
    """Executes the graph with some linear layers as int8 products would compute them."""

    def __init__(self, weights: Mapping[str, Tensor], input_max: Mapping[str, float]) -> None:
        rounded = {name: rows * scales for name in input_max for rows, scales in [int8_rows(weights[name])]}
        super().__init__({**weights, **rounded})
        self._input_max = input_max

    def linear(self, x: Tensor, name: str) -> Tensor:
        if name in self._input_max:
            step = self._input_max[name] / 128
            x = (x / step).round().clamp(-128, 127) * step
        return super().linear(x, name)


@torch.inference_mode()
def _logits(ops: TorchOps, shape: ModelShape, sequences: Sequence[Ids]) -> Tensor:
    rows = (torch.from_numpy(ids).long()[None] for ids in sequences)
    return torch.cat([Scorer(ops, shape, GraphForm()).logits(row, torch.ones_like(row)) for row in rows])


def linear_layers(shape: ModelShape) -> list[str]:
    """The encoder's linear layers."""
    return [name for group in _groups(shape) for name in group]


def _groups(shape: ModelShape) -> list[tuple[str, ...]]:
    layers = range(shape.num_layers)
    return [tuple(f"layers.{layer}.{name}" for name in group) for layer in layers for group in _GROUPS]


@torch.inference_mode()
def group_errors(
    weights: Mapping[str, Tensor], input_max: Mapping[str, float], shape: ModelShape, sequences: Sequence[Ids]
) -> dict[tuple[str, ...], float]:
    """Root mean square change of the logits by group of linear layers, when only that group is quantised."""
    before = _logits(TorchOps(weights), shape, sequences)
    errors = {}
    for group in _groups(shape):
        ops = _RoundingOps(weights, {name: input_max[name] for name in group})
        errors[group] = float((_logits(ops, shape, sequences) - before).square().mean().sqrt())
    return errors


def _smooth(weights: dict[str, Tensor], channel_max: dict[str, Tensor], name: str, source: str) -> None:
    """Divides the inputs of `name` by factors, channel by channel, through the rows of `source`."""
    tiny = 1e-5
    inputs, columns = channel_max[name].clamp(min=tiny), weights[name].abs().amax(0).clamp(min=tiny)
    factors = inputs**_SMOOTHING / columns ** (1 - _SMOOTHING)
    factors = factors / factors.log().mean().exp()
    weights[name] = weights[name] * factors
    _scale_rows(weights, source, 1 / factors)
    channel_max[name] = channel_max[name] / factors


def _scale_rows(weights: dict[str, Tensor], name: str, factors: Tensor) -> None:
    """Multiplies the outputs of `name` by factors, channel by channel."""
    weights[name] = weights[name] * factors[:, None]
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"] * factors


def _balance(weights: dict[str, Tensor], channel_max: dict[str, Tensor], layer: str, shape: ModelShape) -> None:
    """Brings queries and keys to one size, through the rows of both.

    The two channels that RoPE rotates together have one factor, which therefore passes through the rotation.
    """
    queries, keys = f"{layer}.o.queries", f"{layer}.o.keys"

    def per_pair(name: str) -> Tensor:
        halves = channel_max[name].reshape(shape.num_heads, 2, -1)
        return halves.amax(1, keepdim=True).expand_as(halves).reshape(-1).clamp(min=1e-5)

    factors = (per_pair(keys) / per_pair(queries)).sqrt()
    for name, noted, factor in ((f"{layer}.q", queries, factors), (f"{layer}.k", keys, 1 / factors)):
        _scale_rows(weights, name, factor)
        channel_max[noted] = channel_max[noted] * factor


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as int8 (−127 … 127) and its scales, float32 [out, 1]."""
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return (weight / scales).round().clamp(-127, 127).to(torch.int8), scales
