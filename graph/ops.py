"""The primitive operations that the scorer is described with."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")

Kind = Literal["int", "compute", "float32"]

# Prefixes of the names of nodes that a runtime may leave out: those that `Ops.same_when_short` marked, and the rounding
# of queries and keys, which pays only where the rest is float32.
SAME_WHEN_SHORT = "same-when-short-"
ONLY_IN_F32 = "only-in-f32-"


class Ops(Protocol[T]):
    """What an engine must offer to run or store the scorer.

    A `T` is the engine's handle of one value: a tensor, a graph node, a name. Integers (positions, lengths, dimensions)
    are int64, and dimensions are values, so no shape is fixed when the graph is written. "compute" is the floating type
    of the linear layers and attention; it may equal float32. Elementwise operations broadcast.
    """

    def weight(self, name: str) -> T:
        """A folded weight (see `fold.inference_weights`) in the type that the engine stores it in."""

    def integer(self, value: int) -> T:
        """A scalar int64 constant."""

    def dim(self, x: T, axis: int) -> T:
        """The length of an axis, as a scalar int64."""

    def arange(self, count: T) -> T:
        """0 … count − 1, int64 [count]."""

    def cast(self, x: T, kind: Kind) -> T:
        """The same values in another type."""

    def add(self, a: T, b: T) -> T:
        """The sum."""

    def subtract(self, a: T, b: T) -> T:
        """The difference a − b."""

    def multiply(self, a: T, b: T) -> T:
        """The product of the elements."""

    def floor_divide(self, a: T, b: T) -> T:
        """⌊a / b⌋ of non-negative integers."""

    def minimum(self, a: T, b: T) -> T:
        """The smaller of a and b."""

    def maximum(self, a: T, b: T) -> T:
        """The larger of a and b."""

    def absolute(self, x: T) -> T:
        """|x| of integers."""

    def bias_where(self, a: T, b: T, bias: float) -> T:
        """`bias` where integer a > b, 0 elsewhere, in the compute type."""

    def count_at_most(self, boundaries: T, values: T) -> T:
        """How many of the ascending `boundaries` are ≤ each of `values`: int64 [m], [n] → [n]."""

    def reshape(self, x: T, dims: Sequence[int | T]) -> T:
        """The same elements in another shape; −1 stands for what remains, 0 for the dimension at that place."""

    def transpose(self, x: T, axes: Sequence[int]) -> T:
        """Axes in another order."""

    def gather(self, x: T, index: T, axis: int) -> T:
        """Rows `index` (int64, one axis) of x along `axis`."""

    def same_when_short(self, x: T) -> T:
        """Marks a value that equals the first input of its operation (or broadcasts like it) if there is one block.

        Runtimes that can change a graph at load may leave the operation out for such inputs.
        """

    def first(self, x: T, count: T, axis: int) -> T:
        """The first `count` rows along `axis`."""

    def pad_end(self, x: T, count: T, value: int) -> T:
        """Integer x [rows, columns] with `count` more columns of `value`."""

    def embedding(self, ids: T, name: str) -> T:
        """Rows of table `name`, in the compute type: ids [rows, columns] → [rows, columns, H]."""

    def linear(self, x: T, name: str) -> T:
        """The product x · Wᵀ over the last axis, with weight `name` stored [out, in], plus `name`.bias if it exists."""

    def linears(self, x: T, names: Sequence[str], joint: bool) -> list[T]:
        """`linear` with each of several weights of one shape; joint: as one product that is then split."""

    def normalise(self, x: T, eps: float) -> T:
        """LayerNorm over the last axis without weight and bias, computed in float32."""

    def mean(self, x: T, members: T) -> T:
        """Means of tokens, in float32: x [rows, tokens, H], members 0 or 1 [rows, means, tokens] → [rows, means, H]."""

    def gelu(self, x: T) -> T:
        """The exact (erf) GELU."""

    def expand(self, x: T, dims: Sequence[int | T]) -> T:
        """Repeats axes of length 1 to the lengths `dims`."""

    def rotate(self, x: T, cos: T, sin: T) -> T:
        """Rotary embedding of x [rows, heads, tokens, d] by cos, sin [rows or 1, 1, tokens, d]; axes 1, 2 may swap."""

    def attention(self, q: T, k: T, v: T, bias: T, reader: str) -> T:
        """softmax(q · kᵀ + bias) · v for [rows, heads, tokens, d]; q carries the softmax scale.

        `reader` names the one linear layer that reads the result, for engines that round it at its source.
        """

    def local_attention(self, q: T, k: T, v: T, bias: T, reader: str) -> T:
        """`attention` inside each block of a row: [rows, heads, blocks, tokens of a block, d]."""

    def global_attention(self, q: T, k: T, v: T, bias: T, blocks: T, reader: str) -> T:
        """`attention` of all queries of a long input.

        An engine that stores the scores, which grow with tokens², computes one block of queries after another: `blocks`
        (int64) is their number, 1 for an input that needs no blocks, and divides the tokens.
        """
