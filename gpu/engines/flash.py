"""ModernBERT without padding on PyTorch's own FlashAttention-2 kernel.

The kernel is `torch.nn.attention.varlen.varlen_attn` (torch 2.11 or later), so nothing is downloaded or compiled.
`use_flash` puts it into transformers' stock model, which benchmarks compare with. `FlashGraph` is our own graph on the
same kernel, which takes window and sequence bounds itself: local layers need neither blocks nor masks. Queries, keys
and values come from one product, and so do the two halves of the MLP; where only the first token of a sequence is read
out, the last layer computes no other.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from transformers import AttentionInterface, AttentionMaskInterface

from ettin.artifacts.errors import HardwareError
from ettin.gpu.engines.buckets import Bucket
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
    """Ids and positions, int32 [tokens], and bounds, int32 [pairs + 1], on a device."""
    bucket = Bucket.exact(batch)
    buffer = torch.empty(bucket.size, dtype=torch.int32)
    bucket.fill(batch, buffer.numpy())
    return bucket.parts(buffer.to(device))


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
    is_mean = model.config.classifier_pooling == "mean"
    pooled = _means(hidden[0], bounds) if is_mean else hidden[0].index_select(0, bounds[:-1].long())
    logits: Tensor = model.classifier(model.head(pooled))[:, 0]
    return logits


class Steps:
    """What the graph computes between products and attention, with torch's operations; `TritonSteps` fuses each."""

    def rope(self, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What `rotated` takes: tables [rows, d], in the type that rotation computes in, at positions [tokens]."""
        return cos[positions, None], sin[positions, None]

    def rotated(self, heads: Tensor, count: int, rope: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The parts of heads [tokens, parts, heads, d], the first `count` of them rotated; heads may be overwritten."""
        return tuple(_rotated(part, rope) if i < count else part for i, part in enumerate(heads.unbind(1)))

    def added(self, x: Tensor, change: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum of x and change [tokens, H], in their type, and its norm, which adds up in float32."""
        x = x + change
        return x, _norm(x, eps)

    def gated(self, up_gate: Tensor) -> Tensor:
        """GELU of the first half of each row, in the form with erf, times its second: [tokens, 2 I] → [tokens, I]."""
        up, gate = up_gate.chunk(2, dim=-1)
        return F.gelu(up) * gate


TORCH_STEPS = Steps()


class FlashGraph(nn.Module):
    """The scorer over sequences laid end to end.

    Args:
        weights: what `fold.inference_weights` returns, float32.
        shape: the model's shape.
        kernel: see `use_flash`.
        dtype: of linear layers, attention and residual stream; norms add up, and the head and RoPE compute, in float32.
        steps: what computes the rest.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], shape: ModelShape, kernel: Kernel, dtype: torch.dtype = torch.bfloat16,
        steps: Steps = TORCH_STEPS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape, self._kernel, self._dtype, self._steps = shape, kernel, dtype, steps
        self._wide = torch.promote_types(dtype, torch.float32)  # float64 where the whole graph is
        self.register_buffer("embedding", weights["embedding"].to(dtype))
        for layer in range(shape.num_layers):
            for joint in ("qkv",) if layer < shape.full_layers else ("q", "kv"):
                self._keep_linear(f"{layer}_{joint}", weights, *(f"layers.{layer}.{name}" for name in joint))
            self._keep_linear(f"{layer}_up_gate", weights, f"layers.{layer}.up", f"layers.{layer}.gate")
            for name in ("o", "down"):
                self._keep_linear(f"{layer}_{name}", weights, f"layers.{layer}.{name}")
        for kind in ("global", "local"):
            for part in ("cos", "sin"):
                table = weights[f"{shape.rope_table(kind == 'global')}.{part}"]
                self.register_buffer(f"{kind}_{part}", table.to(self._wide))
        for name in ("dense", "score"):
            self._keep_linear(f"head_{name}", weights, f"head.{name}", dtype=self._wide)

    def _keep_linear(
        self, name: str, weights: Mapping[str, Tensor], *parts: str, dtype: torch.dtype | None = None
    ) -> None:
        """Registers one linear layer, of several with one input, with its bias or None."""
        for suffix in ("", ".bias"):
            tensors = [weights[part + suffix] for part in parts if part + suffix in weights]
            joint = torch.cat(tensors).to(dtype or self._dtype) if tensors else None
            self.register_buffer(name + suffix.replace(".", "_"), joint)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get_buffer(name), getattr(self, f"{name}_bias"))

    def forward(self, input_ids: Tensor, positions: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """Raw logits.

        Args:
            input_ids: int64 or int32 [tokens].
            positions: int64 or int32 [tokens], of each token in its sequence.
            bounds: int32 [pairs + 1], where each sequence begins and the last ends.
            longest: tokens of the longest sequence, or more.

        Returns:
            float32 [pairs].
        """
        shape = self.shape
        rope = {
            is_global: self._steps.rope(self.get_buffer(f"{kind}_cos"), self.get_buffer(f"{kind}_sin"), positions)
            for is_global, kind in ((True, "global"), (False, "local"))
        }
        x = F.embedding(input_ids, self.get_buffer("embedding"))
        change: Tensor | None = None  # what the layer before adds to x
        for layer in range(shape.full_layers):
            is_global = shape.global_layers[layer]
            x, normed = self._added(x, change)
            q, k, v = self._steps.rotated(self._heads(normed, f"{layer}_qkv", 3), 2, rope[is_global])
            x, change = self._output(layer, x, self._attended(is_global, q, k, v, bounds, longest))
        if shape.pooling == "cls":
            x, change = self._cls_layer(shape.full_layers, x, change, rope[shape.global_layers[-1]], bounds, longest)
        x = x if change is None else x + change
        x = _norm(x.to(self._wide), shape.norm_eps)
        x = F.gelu(self._linear(x if shape.pooling == "cls" else _means(x, bounds), "head_dense"))
        return self._linear(_norm(x, shape.head_norm_eps), "head_score")[:, 0]

    def _added(self, x: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream and its norm; the first layer has neither a change nor a norm."""
        return (x, x) if change is None else self._steps.added(x, change, self.shape.norm_eps)

    def _heads(self, x: Tensor, name: str, count: int) -> Tensor:
        return self._linear(x, name).reshape(-1, count, self.shape.num_heads, self.shape.head_dim)

    def _attended(self, is_global: bool, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        side = -1 if is_global else self.shape.window_tokens
        return self._kernel(q, k, v, bounds, bounds, longest, longest, scale=1.0, window_size=(side, side))

    def _output(self, layer: int, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and what the MLP adds to it."""
        x, normed = self._added(x, self._linear(mixed.flatten(1), f"{layer}_o"))
        return x, self._linear(self._steps.gated(self._linear(normed, f"{layer}_up_gate")), f"{layer}_down")

    def _cls_layer(
        self, layer: int, x: Tensor, change: Tensor | None, rope: tuple[Tensor, ...], bounds: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        """The last layer for the first token of each sequence, as `_output` returns it: [pairs, H]."""
        shape, starts = self.shape, bounds[:-1].long()
        x, normed = self._added(x, change)
        k, v = self._steps.rotated(self._heads(normed, f"{layer}_kv", 2), 1, rope)
        # Position 0 is rotated by the angle 0, so the query needs no rotation.
        q = self._linear(normed[starts], f"{layer}_q").reshape(-1, shape.num_heads, shape.head_dim)
        if shape.global_layers[layer]:
            one_each = torch.arange(len(bounds), dtype=torch.int32, device=bounds.device)
            mixed = self._kernel(q, k, v, one_each, bounds, 1, longest, scale=1.0, window_size=(-1, -1))
        else:  # the kernel counts a window from the end, where it takes a lone query to be
            every = torch.zeros_like(k).index_copy_(0, starts, q)
            mixed = self._attended(False, every, k, v, bounds, longest)[starts]
        return self._output(layer, x[starts], mixed)


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


def _means(x: Tensor, bounds: Tensor) -> Tensor:
    """Means of the tokens of each sequence: [tokens, H] → [pairs, H]."""
    # Without `unsafe`, torch checks the lengths on the host, which waits for the GPU and can't be captured.
    return torch.segment_reduce(x, "mean", lengths=bounds.diff().long(), axis=0, unsafe=True)


def _rotated(x: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotates x [tokens, heads, d] in the type of cos and sin [tokens, 1, d]; the result has that of x."""
    cos, sin = rope
    wide = x.to(cos.dtype)
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)
