"""The scorer over sequences laid end to end, for engines whose attention takes their bounds itself.

The same layers as `scorer`, on [1, tokens] instead of [rows, tokens]. Attention is one operation, which rotates queries
and keys, keeps sequences apart and knows the window: no masks, blocks, tables or transposes are left in the graph, no
token is padding, and one graph serves every length.
"""

from functools import partial
from typing import Protocol

from ettin.runtimes.graph.ops import Ops, T
from ettin.runtimes.graph.scorer import GraphForm, Scorer
from ettin.runtimes.graph.shape import ModelShape


class RaggedOps(Ops[T], Protocol[T]):
    """What an engine must offer beyond `Ops`."""

    def ragged_attention(
        self, q: T, k: T, v: T, cu_seqlens: T, window: int, theta: float, first_only: bool, reader: str
    ) -> T:
        """softmax(rope(q) · rope(k)ᵀ) · v for each sequence and head: [1, tokens, H].

        Args:
            q: [1, tokens, H], carrying the softmax scale; with `first_only` [1, pairs, H].
            k: [1, tokens, H].
            v: [1, tokens, H].
            cu_seqlens: int64 [pairs + 1], where each sequence begins and the last ends; tokens after that belong to
                none, their result is 0.
            window: tokens that each sees to both sides; −1: all of its sequence.
            theta: base of the rotary frequencies; positions count from each sequence's first token.
            first_only: whether only the first token of each sequence asks.
            reader: see `Ops.attention`.
        """
        ...


class RaggedScorer(Scorer[T]):
    """Describes the ragged form of the scorer.

    Args:
        ops: the engine's operations, holding the folded weights.
        shape: the model's shape.
        form: speed choices; those about blocks have no meaning here.
    """

    def __init__(self, ops: RaggedOps[T], shape: ModelShape, form: GraphForm) -> None:
        super().__init__(ops, shape, form)
        self._ragged_ops = ops

    def ragged_logits(self, input_ids: T, cu_seqlens: T) -> T:
        """Raw logits.

        Args:
            input_ids: int64 [tokens], the sequences one after the other, then any padding.
            cu_seqlens: int64 [pairs + 1], where each begins and the last ends; each begins at a token.

        Returns:
            float32 [pairs, 1].
        """
        ops = self.ops
        starts = ops.first(cu_seqlens, ops.subtract(ops.dim(cu_seqlens, 0), ops.integer(1)), 0)
        return self._scored(
            ops.reshape(input_ids, [1, -1]),
            partial(self._ragged_attention, cu_seqlens=cu_seqlens),
            partial(self._ragged_cls_layer, cu_seqlens=cu_seqlens, starts=starts),
        )

    def _ragged_attention(self, layer: int, x: T, cu_seqlens: T) -> T:
        q, k, v = (self.ops.linear(x, f"layers.{layer}.{name}") for name in "qkv")
        return self.ops.linear(self._mixed(layer, q, k, v, cu_seqlens), f"layers.{layer}.o")

    def _mixed(self, layer: int, q: T, k: T, v: T, cu_seqlens: T, first_only: bool = False) -> T:
        shape = self.shape
        window, theta = (
            (-1, shape.rope_theta_global)
            if shape.global_layers[layer]
            else (shape.window_tokens, shape.rope_theta_local)
        )
        return self._ragged_ops.ragged_attention(q, k, v, cu_seqlens, window, theta, first_only, f"layers.{layer}.o")

    def _ragged_cls_layer(self, layer: int, x: T, cu_seqlens: T, starts: T) -> T:
        """The last layer for each sequence's first token alone: [1, pairs, H]."""
        ops = self.ops
        normed = self._attention_input(layer, x)
        q = ops.linear(ops.gather(normed, starts, 1), f"layers.{layer}.q")
        k, v = (ops.linear(normed, f"layers.{layer}.{name}") for name in "kv")
        return self._cls_output(layer, ops.gather(x, starts, 1), self._mixed(layer, q, k, v, cu_seqlens, True))
