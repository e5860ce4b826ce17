"""The scorer over tokens laid end to end, without padding: two forms with the layers of `scorer` on [1, tokens].

`PackedScorer` is for engines with plain attention (TensorRT, ONNX Runtime on GPUs). A local layer attends in blocks of
the packed tokens; a mask keeps sequences apart. A global layer gathers queries, keys and values to [pairs, longest],
attends, and gathers back. No shape depends on data: the longest length is the shape of an input whose values are not
read.

`RaggedScorer` is for engines whose attention takes the bounds of sequences itself, rotates queries and keys and knows
the window. The graph has no masks, blocks, tables or transposes, and serves every length.
"""

from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol

from ettin.graph.ops import Ops, T
from ettin.graph.scorer import MASK_BIAS, GraphForm, Scorer
from ettin.graph.shape import ModelShape


@dataclass(frozen=True)
class _Slots(Generic[T]):
    """Indices of the tokens of each sequence, padded to [pairs, count]."""

    index: T  # int64 [pairs · count]: a slot past the end of a sequence repeats its last token
    bias: T  # [pairs, 1, 1, count]
    count: T


@dataclass(frozen=True)
class _Packing(Generic[T]):
    """Values that depend on the lengths alone."""

    pairs: T
    blocks: T
    starts: T  # int64 [pairs]
    longest: _Slots[T]
    back: T  # int64 [tokens]: the slot of each token
    key_index: T  # int64 [blocks · keys]
    block_bias: T  # [blocks, 1, queries, keys]
    rope: dict[bool, tuple[T, T]]  # cos, sin [1, tokens, 1, d] by "is global"


class PackedScorer(Scorer[T]):
    """Describes the packed form; see `Scorer`. Local layers attend in blocks whatever `form.block_threshold_tokens`."""

    def packed_logits(self, input_ids: T, cu_seqlens: T, longest: T) -> T:
        """Raw logits.

        Args:
            input_ids: int64 [tokens], the sequences one after the other.
            cu_seqlens: int64 [pairs + 1], where each begins and the last ends; no sequence is empty.
            longest: int64 [tokens of the longest sequence, or more]; only its shape is used.

        Returns:
            float32 [pairs, 1].
        """
        ops = self.ops
        ids, packing = self._packing(input_ids, cu_seqlens, ops.dim(longest, 0))
        return self._scored(
            ids,
            partial(self._packed_attention, packing=packing),
            partial(self._packed_cls_layer, packing=packing),
            partial(_members, ops, ids, cu_seqlens),
        )

    def _packing(self, input_ids: T, cu_seqlens: T, longest: T) -> tuple[T, _Packing[T]]:
        ops, window = self.ops, self.shape.window_tokens
        one, block = ops.integer(1), ops.integer(self.form.block_tokens)
        total = ops.dim(input_ids, 0)
        pairs = ops.subtract(ops.dim(cu_seqlens, 0), one)
        starts = ops.first(cu_seqlens, pairs, 0)
        ends = ops.gather(cu_seqlens, ops.add(ops.arange(pairs), one), 0)

        # Whole blocks: the tokens that fill the last one belong to no sequence but to themselves.
        blocks = ops.floor_divide(ops.add(total, ops.subtract(block, one)), block)
        tokens = ops.multiply(blocks, block)
        ids = ops.pad_end(ops.reshape(input_ids, [1, -1]), ops.subtract(tokens, total), self.shape.pad_token_id)
        token = ops.arange(tokens)
        sequence = ops.count_at_most(ends, token)
        position = ops.subtract(token, ops.gather(cu_seqlens, sequence, 0))

        keys = ops.minimum(tokens, ops.integer(self.form.block_tokens + 2 * window))
        block_start = ops.multiply(ops.arange(blocks), block)
        key_index = ops.reshape(self._block_keys(block_start, keys, tokens), [-1])

        def apart(values: T) -> T:
            """|query's value − key's value| [blocks, 1, queries, keys]."""
            of_queries = ops.reshape(values, [blocks, 1, block, 1])
            return ops.absolute(
                ops.subtract(of_queries, ops.reshape(ops.gather(values, key_index, 0), [blocks, 1, 1, keys]))
            )

        outside = ops.bias_where(apart(token), ops.integer(window), MASK_BIAS)
        foreign = ops.bias_where(apart(sequence), ops.integer(0), MASK_BIAS)

        slots = self._slots(starts, ends, longest)
        last_pair, last_slot = ops.subtract(pairs, one), ops.subtract(longest, one)
        row = ops.multiply(ops.minimum(sequence, last_pair), longest)
        rope = {kind: self._packed_rope(kind, position) for kind in (True, False)}
        back = ops.add(row, ops.minimum(position, last_slot))
        return ids, _Packing(pairs, blocks, starts, slots, back, key_index, ops.minimum(outside, foreign), rope)

    def _slots(self, starts: T, ends: T, count: T) -> _Slots[T]:
        ops = self.ops
        slot = ops.reshape(ops.arange(count), [1, -1])
        first, last = ops.reshape(starts, [-1, 1]), ops.subtract(ops.reshape(ends, [-1, 1]), ops.integer(1))
        bias = ops.bias_where(slot, ops.subtract(last, first), MASK_BIAS)
        index = ops.reshape(ops.minimum(ops.add(first, slot), last), [-1])
        return _Slots(index, ops.reshape(bias, [-1, 1, 1, count]), count)

    def _packed_rope(self, is_global: bool, position: T) -> tuple[T, T]:
        ops = self.ops
        name = self.shape.rope_table(is_global)
        tables = (ops.gather(ops.weight(f"{name}.{part}"), position, 0) for part in ("cos", "sin"))
        cos, sin = (ops.reshape(table, [1, -1, 1, self.shape.head_dim]) for table in tables)
        return cos, sin

    def _rows(self, x: T, index: T, rows: T) -> T:
        """Tokens `index` of x [1, tokens, heads, d] as [rows, heads, tokens of a row, d]."""
        ops, shape = self.ops, self.shape
        chosen = ops.reshape(ops.gather(x, index, 1), [rows, -1, shape.num_heads, shape.head_dim])
        return ops.transpose(chosen, [0, 2, 1, 3])

    def _packed_attention(self, layer: int, x: T, packing: _Packing[T]) -> T:
        ops, shape = self.ops, self.shape
        is_global = shape.global_layers[layer]
        q, k, v = (self._heads(x, f"layers.{layer}.{name}") for name in "qkv")
        q, k = (ops.rotate(tensor, *packing.rope[is_global]) for tensor in (q, k))
        reader = f"layers.{layer}.o"
        if is_global:
            q, k, v = (self._rows(tensor, packing.longest.index, packing.pairs) for tensor in (q, k, v))
            mixed = ops.transpose(ops.attention(q, k, v, packing.longest.bias, reader), [0, 2, 1, 3])
            mixed = ops.gather(ops.reshape(mixed, [-1, shape.hidden_size]), packing.back, 0)
        else:
            q = ops.reshape(q, [packing.blocks, -1, shape.num_heads, shape.head_dim])
            k, v = (self._rows(tensor, packing.key_index, packing.blocks) for tensor in (k, v))
            mixed = ops.attention(ops.transpose(q, [0, 2, 1, 3]), k, v, packing.block_bias, reader)
            mixed = ops.transpose(mixed, [0, 2, 1, 3])
        return ops.linear(ops.reshape(mixed, [1, -1, shape.hidden_size]), reader)

    def _packed_cls_layer(self, layer: int, x: T, packing: _Packing[T]) -> T:
        """The last layer for each sequence's first token alone: [pairs, 1, H]."""
        ops, shape = self.ops, self.shape
        is_global = shape.global_layers[layer]
        normed = self._attention_input(layer, x)
        k, v = (self._heads(normed, f"layers.{layer}.{name}") for name in "kv")
        k = ops.rotate(k, *packing.rope[is_global])
        k, v = (self._rows(tensor, packing.longest.index, packing.pairs) for tensor in (k, v))
        bias = packing.longest.bias
        if not is_global:  # CLS sees the first tokens only
            seen = ops.minimum(packing.longest.count, ops.integer(shape.window_tokens + 1))
            k, v, bias = ops.first(k, seen, 2), ops.first(v, seen, 2), ops.first(bias, seen, 3)
        # Position 0 is rotated by the angle 0, so the query needs no rotation.
        q = ops.transpose(self._heads(ops.gather(normed, packing.starts, 1), f"layers.{layer}.q"), [1, 2, 0, 3])
        mixed = ops.reshape(ops.attention(q, k, v, bias, f"layers.{layer}.o"), [-1, 1, shape.hidden_size])
        cls = ops.reshape(ops.gather(x, packing.starts, 1), [-1, 1, shape.hidden_size])
        return self._cls_output(layer, cls, mixed)


def _members(ops: Ops[T], ids: T, cu_seqlens: T) -> T:
    """1 for the tokens of each sequence [1, pairs, tokens]; those that fill the end belong to none."""
    one = ops.integer(1)
    pairs = ops.subtract(ops.dim(cu_seqlens, 0), one)
    starts = ops.reshape(ops.first(cu_seqlens, pairs, 0), [1, -1, 1])
    ends = ops.reshape(ops.gather(cu_seqlens, ops.add(ops.arange(pairs), one), 0), [1, -1, 1])
    token = ops.arange(ops.dim(ids, 1))
    return ops.multiply(ops.bias_where(ends, token, 1.0), ops.bias_where(ops.add(token, one), starts, 1.0))


class RaggedOps(Ops[T], Protocol[T]):
    """What an engine must offer beyond `Ops`."""

    def ragged_attention(
        self, q: T, k: T, v: T, cu_seqlens: T, heads: int, window: int, theta: float, first_only: bool, reader: str
    ) -> T:
        """softmax(rope(q) · rope(k)ᵀ) · v for each sequence and head: [1, tokens, H].

        Args:
            q: [1, tokens, H], carrying the softmax scale; with `first_only` [1, pairs, H].
            k: [1, tokens, H].
            v: [1, tokens, H].
            cu_seqlens: int64 [pairs + 1], where each sequence begins and the last ends; later tokens give 0.
            heads: number of heads.
            window: tokens that each sees to both sides; −1: all of its sequence.
            theta: base of the rotary frequencies; positions count from each sequence's first token.
            first_only: whether q holds the first token of each sequence only.
            reader: see `Ops.attention`.
        """


class RaggedScorer(Scorer[T]):
    """Describes the ragged form; see `Scorer`. The choices of `form` about blocks have no effect."""

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
        ids = ops.reshape(input_ids, [1, -1])
        starts = ops.first(cu_seqlens, ops.subtract(ops.dim(cu_seqlens, 0), ops.integer(1)), 0)
        return self._scored(
            ids,
            partial(self._ragged_attention, cu_seqlens=cu_seqlens),
            partial(self._ragged_cls_layer, cu_seqlens=cu_seqlens, starts=starts),
            partial(_members, ops, ids, cu_seqlens),
        )

    def _ragged_attention(self, layer: int, x: T, cu_seqlens: T) -> T:
        q, k, v = (self.ops.linear(x, f"layers.{layer}.{name}") for name in "qkv")
        return self.ops.linear(self._mixed(layer, q, k, v, cu_seqlens), f"layers.{layer}.o")

    def _mixed(self, layer: int, q: T, k: T, v: T, cu_seqlens: T, first_only: bool = False) -> T:
        shape = self.shape
        window, theta = shape.window_tokens, shape.rope_theta_local
        if shape.global_layers[layer]:
            window, theta = -1, shape.rope_theta_global
        return self._ragged_ops.ragged_attention(
            q, k, v, cu_seqlens, shape.num_heads, window, theta, first_only, f"layers.{layer}.o"
        )

    def _ragged_cls_layer(self, layer: int, x: T, cu_seqlens: T, starts: T) -> T:
        """The last layer for each sequence's first token alone: [1, pairs, H]."""
        ops = self.ops
        cls = ops.gather(x, starts, 1)
        normed = self._attention_input(layer, x)  # read by products alone, so that its rounding can move into the norm
        q = ops.linear(self._attention_input(layer, cls), f"layers.{layer}.q")
        k, v = (ops.linear(normed, f"layers.{layer}.{name}") for name in "kv")
        return self._cls_output(layer, cls, self._mixed(layer, q, k, v, cu_seqlens, True))
