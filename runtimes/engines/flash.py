"""ModernBERT without padding on PyTorch's own FlashAttention-2 kernel.

The kernel is `torch.nn.attention.varlen.varlen_attn` (torch 2.11 or later), so nothing is downloaded or compiled.
`use_flash` puts it into transformers' stock model, which benchmarks compare with. `FlashGraph` is our own graph on the
same kernel, which takes window and sequence bounds itself: local layers need neither blocks nor masks. Queries, keys
and values come from one product, and so do the two halves of the MLP; the last layer computes one token of a sequence.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from transformers import AttentionInterface, AttentionMaskInterface

from ettin.artifacts.errors import HardwareError
from ettin.graph.fold import HEAD_DENSE, HEAD_NORM, HEAD_SCORE
from ettin.graph.shape import ModelShape
from ettin.runtimes.batch import Batch

Kernel = Callable[..., Tensor]


def flash_kernel() -> Kernel:
    """PyTorch's kernel; raises `HardwareError` if it does not run here, or this torch has none."""
    if not torch.cuda.is_available():
        raise HardwareError("FlashAttention-2 runs on CUDA devices, torch finds none. Run: ettin-export --doctor")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise HardwareError(
            f"FlashAttention-2 needs sm_80 or later, {torch.cuda.get_device_name()} is sm_{major}{minor}"
        )
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise HardwareError(f"torch {torch.__version__} has no varlen_attn. Run: pip install -U torch") from None
    return cast(Kernel, varlen_attn)


def use_flash(model: Any, kernel: Kernel) -> None:
    """Makes a transformers model attend with `kernel`; it is then called by `flash_logits` only.

    Args:
        model: a ModernBERT model of transformers 5, in bf16 for the real kernel.
        kernel: (q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size) → [tokens, heads, d], for q, k and v of that
            shape and int32 bounds; a window (w, w) lets each token see w to both sides, (−1, −1) all.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
        sliding_window: int | None, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        mixed = kernel(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
            window_size=window_size(sliding_window),
        )  # fmt: skip
        return mixed[None], None

    attend_with(model, f"ettin_{getattr(kernel, '__name__', 'kernel')}", attention, lambda *_, **__: None)


def window_size(sliding_window: int | None) -> tuple[int, int]:
    """A layer's window as kernels take it: 65 of transformers, which counts the token itself, is 64 to both sides."""
    side = -1 if sliding_window is None else sliding_window - 1
    return side, side


def attend_with(model: Any, name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Gives a transformers model its own attention.

    Args:
        model: of transformers 5.
        name: without "flash" in it, which transformers 5.23 would look up on the hub.
        attention: see transformers' `AttentionInterface`.
        mask: see transformers' `AttentionMaskInterface`.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)


def packed_inputs(batch: Batch, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions, int64 [tokens], and bounds, int32 [pairs + 1], on a device."""
    lengths = np.diff(batch.cu_seqlens)
    positions = np.arange(len(batch.ids)) - np.repeat(batch.cu_seqlens[:-1], lengths)
    arrays = (batch.ids.astype(np.int64), positions, batch.cu_seqlens)
    ids, places, bounds = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return ids, places, bounds


def flash_logits(model: Any, batch: Batch, device: str | torch.device) -> Tensor:
    """Raw logits [pairs], in the model's type, of a ModernBertForSequenceClassification after `use_flash`."""
    ids, positions, bounds = packed_inputs(batch, device)
    hidden = model.model(
        input_ids=ids[None],
        position_ids=positions[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=batch.longest,
        max_length_k=batch.longest,
    ).last_hidden_state
    logits: Tensor = model.classifier(model.head(hidden[0].index_select(0, bounds[:-1].long())))[:, 0]
    return logits


class FlashGraph(nn.Module):
    """The scorer over sequences laid end to end.

    Args:
        weights: what `fold.inference_weights` returns, float32.
        shape: the model's shape.
        kernel: see `use_flash`.
        dtype: of linear layers, attention and residual stream; norms add up, and the head and RoPE compute, in float32.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], shape: ModelShape, kernel: Kernel, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.shape, self._kernel, self._dtype = shape, kernel, dtype
        self._wide = torch.promote_types(dtype, torch.float32)  # float64 where the whole graph is
        last = shape.num_layers - 1
        self._keep("embedding", weights["embedding"])
        for layer in range(shape.num_layers):
            for joint in ("q", "kv") if layer == last else ("qkv",):
                self._keep(f"{layer}_{joint}", torch.cat([weights[f"layers.{layer}.{name}"] for name in joint]))
            up_gate = [weights[f"layers.{layer}.{name}"] for name in ("up", "gate")]
            self._keep(f"{layer}_up_gate", torch.cat(up_gate))
            for name in ("o", "down"):
                self._keep(f"{layer}_{name}", weights[f"layers.{layer}.{name}"])
        for name in ("global.cos", "global.sin", "local.cos", "local.sin"):
            self.register_buffer(name.replace(".", "_"), weights[f"rope.{name}"].to(self._wide))
        for name in ("dense", "score", "score.bias"):
            self.register_buffer(f"head_{name.replace('.', '_')}", weights[f"head.{name}"].to(self._wide))

    def _keep(self, name: str, weight: Tensor) -> None:
        self.register_buffer(name, weight.to(self._dtype))

    def forward(self, input_ids: Tensor, positions: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """Raw logits.

        Args:
            input_ids: int64 [tokens].
            positions: int64 [tokens], of each token in its sequence.
            bounds: int32 [pairs + 1], where each sequence begins and the last ends.
            longest: tokens of the longest sequence, or more.

        Returns:
            float32 [pairs].
        """
        shape = self.shape
        rope = {
            is_global: tuple(self.get_buffer(f"{kind}_{part}")[positions, None] for part in ("cos", "sin"))
            for is_global, kind in ((True, "global"), (False, "local"))
        }
        x = F.embedding(input_ids, self.get_buffer("embedding"))
        last = shape.num_layers - 1
        for layer in range(last):
            is_global = shape.global_layers[layer]
            q, k, v = self._heads(self._normed(layer, x), f"{layer}_qkv", 3)
            q, k = _rotated(q, rope[is_global]), _rotated(k, rope[is_global])
            x = self._output(layer, x, self._attended(is_global, q, k, v, bounds, longest))
        return self._head(self._cls_layer(last, x, rope[shape.global_layers[last]], bounds, longest))

    def _normed(self, layer: int, x: Tensor) -> Tensor:
        return x if layer == 0 else _norm(x, self.shape.norm_eps)

    def _heads(self, x: Tensor, name: str, count: int) -> tuple[Tensor, ...]:
        heads = F.linear(x, self.get_buffer(name))
        return heads.reshape(-1, count, self.shape.num_heads, self.shape.head_dim).unbind(1)

    def _attended(self, is_global: bool, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        side = -1 if is_global else self.shape.window_tokens
        return self._kernel(q, k, v, bounds, bounds, longest, longest, scale=1.0, window_size=(side, side))

    def _output(self, layer: int, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer after attention."""
        x = x + F.linear(mixed.flatten(1), self.get_buffer(f"{layer}_o"))
        up, gate = F.linear(_norm(x, self.shape.norm_eps), self.get_buffer(f"{layer}_up_gate")).chunk(2, dim=-1)
        return x + F.linear(F.gelu(up) * gate, self.get_buffer(f"{layer}_down"))

    def _cls_layer(self, layer: int, x: Tensor, rope: tuple[Tensor, ...], bounds: Tensor, longest: int) -> Tensor:
        """The last layer for the first token of each sequence: [pairs, H]."""
        shape, starts = self.shape, bounds[:-1].long()
        normed = self._normed(layer, x)
        k, v = self._heads(normed, f"{layer}_kv", 2)
        k = _rotated(k, rope)
        # Position 0 is rotated by the angle 0, so the query needs no rotation.
        q = F.linear(normed[starts], self.get_buffer(f"{layer}_q")).reshape(-1, shape.num_heads, shape.head_dim)
        if shape.global_layers[layer]:
            one_each = torch.arange(len(bounds), dtype=torch.int32, device=bounds.device)
            mixed = self._kernel(q, k, v, one_each, bounds, 1, longest, scale=1.0, window_size=(-1, -1))
        else:  # the kernel counts a window from the end, where it takes a lone query to be
            every = torch.zeros_like(k).index_copy_(0, starts, q)
            mixed = self._attended(False, every, k, v, bounds, longest)[starts]
        return self._output(layer, x[starts], mixed)

    def _head(self, cls: Tensor) -> Tensor:
        x, shape = cls.to(self._wide), self.shape
        x = F.gelu(F.linear(_norm(x, shape.norm_eps), self.get_buffer("head_dense")))
        return F.linear(
            _norm(x, shape.head_norm_eps), self.get_buffer("head_score"), self.get_buffer("head_score_bias")
        )[:, 0]


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


def _rotated(x: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotates x [tokens, heads, d] in the type of cos and sin [tokens, 1, d]; the result has that of x."""
    cos, sin = rope
    wide = x.to(cos.dtype)
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def modular_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and head from the state dict of transformers' model, as `fold.inference_weights` takes them."""
    encoder = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    norm = state["head.norm.weight"]
    return encoder, {
        f"{HEAD_DENSE}/linear.weight": state["head.dense.weight"],
        f"{HEAD_NORM}/norm.weight": norm,
        f"{HEAD_NORM}/norm.bias": torch.zeros_like(norm),
        f"{HEAD_SCORE}/linear.weight": state["classifier.weight"],
        f"{HEAD_SCORE}/linear.bias": state["classifier.bias"],
    }
