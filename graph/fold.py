"""Checkpoint tensors → the weights of the inference graph, with the norms folded in. Needs torch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ettin.graph.shape import ModelShape

# Names of the head's tensors in the modular checkpoint, as `<module folder>/<tensor>`.
HEAD_DENSE, HEAD_NORM, HEAD_SCORE = "2_Dense", "3_LayerNorm", "4_Dense"


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
        rope.{global,local}.{cos,sin} [rope_rows, d].
    """
    wide = torch.float64

    def scaled(weight: Tensor, norm: Tensor | None, factor: float = 1.0) -> Tensor:
        result = weight.to(wide) * factor
        return (result if norm is None else result * norm.to(wide)).to(dtype)

    table = torch.nn.functional.layer_norm(
        encoder["embeddings.tok_embeddings.weight"].to(wide),
        (shape.hidden_size,),
        encoder["embeddings.norm.weight"].to(wide),
        eps=shape.norm_eps,
    )
    weights = {"embedding": table.to(dtype)}
    for layer in range(shape.num_layers):
        source, target = f"layers.{layer}.", f"layers.{layer}."
        attention_norm = encoder[source + "attn_norm.weight"] if layer else None
        q, k, v = encoder[source + "attn.Wqkv.weight"].chunk(3)
        weights[target + "q"] = scaled(q, attention_norm, shape.head_dim**-0.5)
        weights[target + "k"] = scaled(k, attention_norm)
        weights[target + "v"] = scaled(v, attention_norm)
        weights[target + "o"] = scaled(encoder[source + "attn.Wo.weight"], None)
        up, gate = encoder[source + "mlp.Wi.weight"].chunk(2)
        mlp_norm = encoder[source + "mlp_norm.weight"]
        weights[target + "up"] = scaled(up, mlp_norm)
        weights[target + "gate"] = scaled(gate, mlp_norm)
        weights[target + "down"] = scaled(encoder[source + "mlp.Wo.weight"], None)

    score, score_bias = folded_classifier(head)
    weights["head.dense"] = scaled(head[f"{HEAD_DENSE}/linear.weight"], encoder["final_norm.weight"])
    weights["head.score"] = scaled(score, head[f"{HEAD_NORM}/norm.weight"])
    weights["head.score.bias"] = score_bias.to(dtype)
    for kind, theta in (("global", shape.rope_theta_global), ("local", shape.rope_theta_local)):
        cos, sin = rope_tables(theta, shape.rope_rows, shape.head_dim, dtype)
        weights[f"rope.{kind}.cos"], weights[f"rope.{kind}.sin"] = cos, sin
    return weights


def folded_classifier(head: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The last Dense with the LayerNorm's bias moved into its own: weight [1, H], bias [1] in float64.

    w · (n ⊙ g + b) + c = w · (n ⊙ g) + (c + w · b), where g and b are the LayerNorm's weight and bias.
    """
    weight = head[f"{HEAD_SCORE}/linear.weight"].to(torch.float64)
    bias = head[f"{HEAD_SCORE}/linear.bias"].to(torch.float64)
    return weight, bias + weight @ head[f"{HEAD_NORM}/norm.bias"].to(torch.float64)
