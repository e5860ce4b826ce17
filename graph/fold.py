"""Checkpoint tensors → the weights of the inference graph, with the norms folded in. Needs torch."""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ettin.graph.shape import ModelShape

# Names of the head's tensors in the modular checkpoint, as `<module folder>/<tensor>`.
HEAD_DENSE, HEAD_NORM, HEAD_SCORE = "2_Dense", "3_LayerNorm", "4_Dense"
# The same of a plain checkpoint, by the names of its modules.
PLAIN_HEAD = {
    "head.dense": f"{HEAD_DENSE}/linear",
    "head.norm": f"{HEAD_NORM}/norm",
    "classifier": f"{HEAD_SCORE}/linear",
}

# The projections of a layer: their name in the checkpoint, the norm in front of them, and what the graph makes of them.
_PROJECTIONS = (
    ("attn.Wqkv", "attn_norm", ("q", "k", "v")),
    ("attn.Wo", None, ("o",)),
    ("mlp.Wi", "mlp_norm", ("up", "gate")),
    ("mlp.Wo", None, ("down",)),
)


class Affine(NamedTuple):
    """Weight and bias of a linear layer or a norm, in float64."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], module: str) -> Self:
        """Those of a module, by its name."""
        bias = tensors.get(f"{module}.bias")
        return cls(tensors[f"{module}.weight"].to(torch.float64), None if bias is None else bias.to(torch.float64))

    def behind(self, norm: "Affine") -> "Affine":
        """A linear layer that takes in the weight and the bias of the norm in front of it.

        W · (n ⊙ g + b) + c = (W ⊙ g) · n + (W · b + c), where g and b are the norm's weight and bias.
        """
        bias = self.bias
        if norm.bias is not None:
            bias = self.weight @ norm.bias + (0.0 if bias is None else bias)
        return Affine(self.weight * norm.weight, bias)


def rope_tables(theta: float, rows: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin [rows, head_dim]; both halves of a row are the same angles.

    Angles are computed in float32 even for float64 tables: that is what transformers does
    (`ModernBertRotaryEmbedding.forward`), and at position 7998 its rounding shows.
    """
    inverse_frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.arange(rows, dtype=torch.float32)[:, None] * inverse_frequency
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inference_weights(
    encoder: Mapping[str, Tensor], head: Mapping[str, Tensor], shape: ModelShape, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The weights that `Scorer` asks for, by name.

    Args:
        encoder: the tensors of the ModernBERT encoder, by their names in `model.safetensors`.
        head: the tensors of the head, by `<module folder>/<tensor>`.
        shape: the model's shape.
        dtype: type of the result. Products of folding are formed in float64.

    Returns:
        embedding [V, H] with its norm applied; layers.i.{q,k,v,o} [H, H]; layers.i.{up,gate} [I, H];
        layers.i.down [H, I]; head.dense [H, H]; head.score [1, H] and head.score.bias [1];
        rope.{global,local}.{cos,sin} [rope_rows, d], see `ModelShape.rope_table`. A linear layer with a bias, its own
        or that of the norm in front of it, has it under its name and ".bias", [out].
    """
    norm = Affine.of(encoder, "embeddings.norm")
    table = encoder["embeddings.tok_embeddings.weight"].to(torch.float64)
    table = torch.nn.functional.layer_norm(table, (shape.hidden_size,), norm.weight, norm.bias, shape.norm_eps)
    weights = {"embedding": table.to(dtype)}

    def keep(layer: Affine, *names: str) -> None:
        """Stores a linear layer, cut by its rows into several."""
        tensors = {"": layer.weight} if layer.bias is None else {"": layer.weight, ".bias": layer.bias}
        for suffix, tensor in tensors.items():
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                factor = shape.head_dim**-0.5 if name.endswith(".q") else 1.0  # the softmax scale
                weights[name + suffix] = (part * factor).to(dtype)

    for index in range(shape.num_layers):
        prefix = f"layers.{index}."
        for source, before, targets in _PROJECTIONS:
            layer = Affine.of(encoder, prefix + source)
            if before and (index or before != "attn_norm"):  # the first layer reads the norm of the embeddings
                layer = layer.behind(Affine.of(encoder, prefix + before))
            keep(layer, *(prefix + target for target in targets))
    keep(Affine.of(head, f"{HEAD_DENSE}/linear").behind(Affine.of(encoder, "final_norm")), "head.dense")
    keep(Affine.of(head, f"{HEAD_SCORE}/linear").behind(Affine.of(head, f"{HEAD_NORM}/norm")), "head.score")
    thetas = {shape.rope_table(False): shape.rope_theta_local, shape.rope_table(True): shape.rope_theta_global}
    for name, theta in thetas.items():
        cos, sin = rope_tables(theta, shape.rope_rows, shape.head_dim, dtype)
        weights[f"{name}.cos"], weights[f"{name}.sin"] = cos, sin
    return weights


def modular_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and head from the state dict of a plain checkpoint, as `inference_weights` takes them."""
    encoder: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if module in PLAIN_HEAD:
            head[f"{PLAIN_HEAD[module]}.{part}"] = tensor
        else:
            encoder[name.removeprefix("model.")] = tensor
    return encoder, head
