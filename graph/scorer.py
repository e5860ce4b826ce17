"""The scorer as a cheaper graph that is equivalent to the checkpoint's own.

All rewritings are exact (up to rounding):

- **CLS-only last layer**: where only the first token is read out (`ModelShape.pooling`), the last layer computes keys
  and values for all tokens, but query, attention, output projection and MLP for one.
- **Folded norms**: the norms here have no weight and no bias; `fold` moved both into the projection that follows.
- **Split projections**: Q, K, V (and, where it pays, the two GeGLU halves) are separate products, so that no joint
  product is split or transposed. The softmax scale is folded into Q.
- **Block-local attention**: a local layer attends from blocks of queries to the keys that they can see, so its cost
  grows with tokens, not tokens². Up to `block_threshold_tokens` the whole input is one block, so one graph serves
  every length.
- **Global attention by blocks**: over the same threshold, an engine that stores scores holds those of one block of
  queries at a time (`Ops.global_attention`), so its memory grows with tokens, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic

from ettin.graph.ops import Ops, T
from ettin.graph.shape import ModelShape

# Added to masked scores. It is finite, so that a row that sees nothing gives no NaN, and within the fp16 range together
# with any score of an fp16 graph (whose activations are refused from 32,000 on).
MASK_BIAS = -3.0e4


@dataclass(frozen=True)
class GraphForm:
    """Choices that change the speed of a graph and not its scores.

    Args:
        block_threshold_tokens: longest input whose local layers are computed densely. Measured with the 17m shape in
            ONNX Runtime on two cores, SciFact pairs: 256 gives 13 % more pairs/s than 512; 192 less.
        block_tokens: queries in a block of a local layer; divides 256 (`ModelShape.rope_rows`).
        split_geglu: two products for the GeGLU halves instead of one.
        rotate_blocks: local layers cut their blocks before rotary embedding, which then rotates each key once for every
            block that sees it. OpenVINO fuses that order into one node; 17m in ONNX Runtime is 1.2 times as fast
            without it at 350 tokens.
    """

    block_threshold_tokens: int = 256
    block_tokens: int = 64
    split_geglu: bool = True
    rotate_blocks: bool = False


@dataclass(frozen=True)
class _View(Generic[T]):
    """How the layers of one kind (global or local) see the input; shared by all of them.

    With `GraphForm.rotate_blocks`, a local layer's rows are the blocks of all inputs, one after the other.
    """

    bias: T  # [rows, 1, 1 or queries, keys]; without rotate_blocks, local layers have [rows, 1, blocks, queries, keys]
    query_rope: tuple[T, T]  # cos, sin [rows or 1, 1, queries, d]
    key_rope: tuple[T, T]  # cos, sin [rows or 1, 1, keys, d]
    key_index: T | None  # int64 [blocks · keys]: the keys that each block sees; None: all


@dataclass(frozen=True)
class _Layout(Generic[T]):
    """Values that depend on lengths and mask alone."""

    rows: T
    tokens: T
    mask: T  # int64 [rows, tokens]: 1 for real tokens
    blocks: T  # of each row: 1 up to the threshold
    block_rows: T  # rows · blocks
    views: dict[bool, _View[T]]  # by "is global"


class Scorer(Generic[T]):
    """Describes the scorer to `ops`.

    Args:
        ops: the engine's primitive operations, holding the folded weights.
        shape: the model's shape.
        form: speed choices.
    """

    def __init__(self, ops: Ops[T], shape: ModelShape, form: GraphForm) -> None:
        span = form.block_tokens + 2 * shape.window_tokens
        if form.block_threshold_tokens < span:
            raise ValueError(f"block_threshold_tokens is {form.block_threshold_tokens}, below one key span {span}")
        if 256 % form.block_tokens:
            raise ValueError(f"block_tokens is {form.block_tokens}, which does not divide 256")
        self.ops, self.shape, self.form = ops, shape, form

    def logits(self, input_ids: T, attention_mask: T) -> T:
        """Raw logits, float32 [rows, 1], of input_ids and attention_mask, int64 [rows, tokens]."""
        input_ids, layout = self._layout(input_ids, attention_mask)
        return self._scored(
            input_ids,
            partial(self._attention, layout=layout),
            partial(self._cls_layer, layout=layout),
            partial(self._members, layout),
        )

    def _scored(
        self,
        input_ids: T,
        attention: Callable[[int, T], T],
        cls_layer: Callable[[int, T], T],
        members: Callable[[], T],
    ) -> T:
        """Embedding, layers, pooling and head.

        The functions know the layout of the tokens: `attention` of a layer, the last layer for first tokens alone, and
        the tokens that each mean is taken of, see `Ops.mean`.
        """
        ops, shape = self.ops, self.shape
        x = ops.embedding(input_ids, "embedding")
        for layer in range(shape.full_layers):
            x = ops.add(x, attention(layer, self._attention_input(layer, x)))
            x = ops.add(x, self._mlp(layer, x))
        if shape.pooling == "cls":
            return self._head(self._final_norm(cls_layer(shape.full_layers, x)))
        return self._head(ops.mean(self._final_norm(x), ops.cast(members(), "float32")))

    def _final_norm(self, x: T) -> T:
        return self.ops.normalise(self.ops.cast(x, "float32"), self.shape.norm_eps)

    def _members(self, layout: _Layout[T]) -> T:
        """1 for the real tokens of each row [rows, 1, tokens]."""
        ops = self.ops
        return ops.reshape(ops.bias_where(layout.mask, ops.integer(0), 1.0), [layout.rows, 1, layout.tokens])

    def _layout(self, input_ids: T, attention_mask: T) -> tuple[T, _Layout[T]]:
        ops, form, window = self.ops, self.form, self.shape.window_tokens
        one, block = ops.integer(1), ops.integer(form.block_tokens)
        rows, length = ops.dim(input_ids, 0), ops.dim(input_ids, 1)

        # 1 for an input over the threshold, else 0: chooses between one block and many without a branch.
        over = ops.floor_divide(length, ops.integer(form.block_threshold_tokens + 1))
        is_long = ops.minimum(over, one)
        whole = ops.floor_divide(ops.add(length, ops.integer(form.block_tokens - 1)), block)
        same = ops.same_when_short
        blocks = same(ops.add(one, ops.multiply(is_long, ops.subtract(whole, one))))
        missing = ops.multiply(is_long, ops.subtract(ops.multiply(whole, block), length))
        input_ids = same(ops.pad_end(input_ids, missing, self.shape.pad_token_id))
        attention_mask = same(ops.pad_end(attention_mask, missing, 0))
        tokens = same(ops.add(length, missing))
        queries = same(ops.floor_divide(tokens, blocks))
        keys = same(ops.minimum(tokens, ops.add(queries, ops.integer(2 * window))))

        block_start = ops.multiply(ops.arange(blocks), queries)
        key_index = self._block_keys(block_start, keys, tokens)
        query_index = ops.add(ops.reshape(block_start, [-1, 1]), ops.arange(queries))
        distance = ops.absolute(
            ops.subtract(ops.reshape(query_index, [blocks, queries, 1]), ops.reshape(key_index, [blocks, 1, keys]))
        )
        flat_index = ops.reshape(key_index, [-1])

        padding = ops.bias_where(one, attention_mask, MASK_BIAS)
        key_padding = ops.reshape(same(ops.gather(padding, flat_index, 1)), [rows, blocks, 1, keys])
        outside = ops.bias_where(distance, ops.integer(window), MASK_BIAS)
        bias = ops.minimum(outside, key_padding)

        rope = self._rope(True, tokens)
        everywhere = _View(ops.reshape(padding, [rows, 1, 1, tokens]), rope, rope, None)
        rope = self._rope(False, tokens)
        if form.rotate_blocks:
            nearby = self._view_of_blocks(bias, rope, flat_index, (rows, blocks, queries, keys))
        else:
            nearby = _View(ops.reshape(bias, [rows, 1, blocks, queries, keys]), rope, rope, flat_index)
        views = {True: everywhere, False: nearby}
        return input_ids, _Layout(rows, tokens, attention_mask, blocks, ops.multiply(rows, blocks), views)

    def _view_of_blocks(self, bias: T, rope: tuple[T, T], key_index: T, dims: tuple[T, T, T, T]) -> _View[T]:
        """A local layer's view for `GraphForm.rotate_blocks`; dims: rows, blocks, queries, keys."""
        ops, same, head_dim = self.ops, self.ops.same_when_short, self.shape.head_dim
        rows, blocks, queries, keys = dims

        def in_blocks(table: T, length: T) -> T:
            by_block = same(ops.reshape(table, [1, blocks, length, head_dim]))
            by_block = same(ops.expand(by_block, [rows, blocks, length, head_dim]))
            return same(ops.reshape(by_block, [-1, 1, length, head_dim]))

        cos, sin = rope
        return _View(
            bias=ops.reshape(bias, [-1, 1, queries, keys]),
            query_rope=(in_blocks(cos, queries), in_blocks(sin, queries)),
            key_rope=(
                in_blocks(same(ops.gather(cos, key_index, 2)), keys),
                in_blocks(same(ops.gather(sin, key_index, 2)), keys),
            ),
            key_index=key_index,
        )

    def _block_keys(self, block_start: T, keys: T, tokens: T) -> T:
        """The keys that each block sees, from `window` before its first query on: int64 [blocks, keys].

        At both ends of the input the span is shifted inwards; the distance between query and key is tested elsewhere.
        """
        ops = self.ops
        key_start = ops.maximum(ops.subtract(block_start, ops.integer(self.shape.window_tokens)), ops.integer(0))
        key_start = ops.minimum(key_start, ops.subtract(tokens, keys))
        return ops.add(ops.reshape(key_start, [-1, 1]), ops.arange(keys))

    def _rope(self, is_global: bool, tokens: T) -> tuple[T, T]:
        """Cos and sin [1, 1, tokens, d]."""
        ops = self.ops
        name = self.shape.rope_table(is_global)
        tables = (ops.first(ops.weight(f"{name}.{part}"), tokens, 0) for part in ("cos", "sin"))
        cos, sin = (ops.reshape(table, [1, 1, -1, self.shape.head_dim]) for table in tables)
        return cos, sin

    def _attention_input(self, layer: int, x: T) -> T:
        """Layer 0 has no attention norm: its input is the normed embedding."""
        return self.ops.normalise(x, self.shape.norm_eps) if layer else x

    def _heads(self, x: T, name: str) -> T:
        shape = self.shape
        return self.ops.reshape(self.ops.linear(x, name), [0, 0, shape.num_heads, shape.head_dim])

    def _attention(self, layer: int, x: T, layout: _Layout[T]) -> T:
        ops, shape, reader = self.ops, self.shape, f"layers.{layer}.o"
        view, rotate_blocks = layout.views[shape.global_layers[layer]], self.form.rotate_blocks
        q, k, v = (self._heads(x, f"layers.{layer}.{name}") for name in "qkv")
        if view.key_index is not None and rotate_blocks:
            in_blocks: list[int | T] = [layout.block_rows, -1, shape.num_heads, shape.head_dim]
            same = ops.same_when_short
            q = same(ops.reshape(q, in_blocks))
            k, v = (same(ops.reshape(same(ops.gather(tensor, view.key_index, 1)), in_blocks)) for tensor in (k, v))
        q, k, v = (ops.transpose(tensor, [0, 2, 1, 3]) for tensor in (q, k, v))
        q, k = ops.rotate(q, *view.query_rope), ops.rotate(k, *view.key_rope)
        if view.key_index is None:
            mixed = ops.global_attention(q, k, v, view.bias, layout.blocks, reader)
        elif rotate_blocks:
            mixed = ops.attention(q, k, v, view.bias, reader)
        else:
            in_blocks = [layout.rows, shape.num_heads, layout.blocks, -1, shape.head_dim]
            k, v = (ops.reshape(ops.gather(tensor, view.key_index, 2), in_blocks) for tensor in (k, v))
            mixed = ops.local_attention(ops.reshape(q, in_blocks), k, v, view.bias, reader)
            mixed = ops.reshape(mixed, [layout.rows, shape.num_heads, -1, shape.head_dim])
        mixed = ops.reshape(ops.transpose(mixed, [0, 2, 1, 3]), [layout.rows, -1, shape.hidden_size])
        return ops.linear(mixed, reader)

    def _mlp(self, layer: int, x: T) -> T:
        ops = self.ops
        x = ops.normalise(x, self.shape.norm_eps)
        names = [f"layers.{layer}.up", f"layers.{layer}.gate"]
        up, gate = ops.linears(x, names, joint=not self.form.split_geglu)
        return ops.linear(ops.multiply(ops.gelu(up), gate), f"layers.{layer}.down")

    def _cls_layer(self, layer: int, x: T, layout: _Layout[T]) -> T:
        """The last layer for the first token alone: [rows, 1, H]."""
        ops, shape = self.ops, self.shape
        one = ops.integer(1)
        bias = layout.views[True].bias
        cos, sin = self._rope(shape.global_layers[layer], layout.tokens)
        if not shape.global_layers[layer]:  # CLS sees the first tokens only
            seen = ops.minimum(layout.tokens, ops.integer(shape.window_tokens + 1))
            x, bias = ops.first(x, seen, 1), ops.first(bias, seen, 3)
            cos, sin = ops.first(cos, seen, 2), ops.first(sin, seen, 2)
        normed, cls = self._attention_input(layer, x), ops.first(x, one, 1)
        q = self._heads(ops.first(normed, one, 1), f"layers.{layer}.q")
        k, v = (self._heads(normed, f"layers.{layer}.{name}") for name in "kv")
        q, k, v = (ops.transpose(tensor, [0, 2, 1, 3]) for tensor in (q, k, v))
        # Position 0 is rotated by the angle 0, so the query needs no rotation.
        mixed = ops.attention(q, ops.rotate(k, cos, sin), v, bias, f"layers.{layer}.o")
        mixed = ops.reshape(mixed, [layout.rows, 1, shape.hidden_size])
        return self._cls_output(layer, cls, mixed)

    def _cls_output(self, layer: int, cls: T, mixed: T) -> T:
        """The rest of a layer after attention, for cls and mixed [rows, 1, H]."""
        cls = self.ops.add(cls, self.ops.linear(mixed, f"layers.{layer}.o"))
        return self.ops.add(cls, self._mlp(layer, cls))

    def _head(self, pooled: T) -> T:
        """Dense, GELU, LayerNorm, Dense in float32: H values of each pair → [pairs, 1]."""
        ops, shape = self.ops, self.shape
        x = ops.gelu(ops.linear(ops.reshape(pooled, [-1, shape.hidden_size]), "head.dense"))
        return ops.linear(ops.normalise(x, shape.head_norm_eps), "head.score")
