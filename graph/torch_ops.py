"""The inference graph executed by torch, to compare it with the checkpoint's own model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from ettin.graph.ops import Kind
from ettin.graph.packed import PackedScorer
from ettin.graph.scorer import GraphForm, Scorer
from ettin.graph.shape import ModelShape


class TorchOps:
    """The primitive operations, executed at once. Dimensions are scalar tensors on the CPU."""

    add, subtract, multiply = staticmethod(torch.add), staticmethod(torch.sub), staticmethod(torch.mul)
    floor_divide, absolute = staticmethod(torch.floor_divide), staticmethod(torch.abs)
    minimum, maximum = staticmethod(torch.minimum), staticmethod(torch.maximum)
    gelu = staticmethod(F.gelu)

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self._device = weights["embedding"].device
        self._types = {"int": torch.int64, "compute": weights["embedding"].dtype}

    def weight(self, name: str) -> Tensor:
        return self.weights[name]

    def integer(self, value: int) -> Tensor:
        return torch.tensor(value)

    def dim(self, x: Tensor, axis: int) -> Tensor:
        return torch.tensor(x.shape[axis])

    def arange(self, count: Tensor) -> Tensor:
        return torch.arange(int(count), device=self._device)

    def cast(self, x: Tensor, kind: Kind) -> Tensor:
        # The head's float32 becomes float64 where the whole graph is float64.
        wide = torch.promote_types(self._types["compute"], torch.float32)
        return x.to(wide if kind == "float32" else self._types[kind])

    def bias_where(self, a: Tensor, b: Tensor, bias: float) -> Tensor:
        return (a > b).to(self._types["compute"]) * bias

    def count_at_most(self, boundaries: Tensor, values: Tensor) -> Tensor:
        return torch.searchsorted(boundaries, values, right=True)

    def reshape(self, x: Tensor, dims: Sequence[int | Tensor]) -> Tensor:
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(int(d) for d in dims)])

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(*axes)

    def gather(self, x: Tensor, index: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, index)

    def same_when_short(self, x: Tensor) -> Tensor:
        return x

    def first(self, x: Tensor, count: Tensor, axis: int) -> Tensor:
        return x.narrow(axis, 0, int(count))

    def pad_end(self, x: Tensor, count: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, int(count)), value=value)

    def embedding(self, ids: Tensor, name: str) -> Tensor:
        return F.embedding(ids, self.weights[name])

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        return F.linear(x, self.weights[name].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def linears(self, x: Tensor, names: Sequence[str], joint: bool) -> list[Tensor]:
        return [self.linear(x, name) for name in names]  # eager torch gains nothing from a joint product

    def normalise(self, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(self.cast(x, "float32"), (x.shape[-1],), eps=eps).to(x.dtype)

    def mean(self, x: Tensor, members: Tensor) -> Tensor:
        return members @ x / members.sum(-1, keepdim=True)

    def expand(self, x: Tensor, dims: Sequence[int | Tensor]) -> Tensor:
        return x.expand([int(size) for size in dims])

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, reader: str) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)

    def local_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, reader: str) -> Tensor:
        return self.attention(q, k, v, bias, reader)  # what a subclass makes of it

    def global_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, blocks: Tensor, reader: str) -> Tensor:
        return self.attention(q, k, v, bias, reader)


class _Graph(nn.Module):
    """A torch module of the scorer. The dtype of `weights` (see `fold.inference_weights`) is the compute type."""

    def __init__(self, weights: Mapping[str, Tensor], shape: ModelShape, form: GraphForm | None = None) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "__"), tensor)  # the name of a buffer may hold no dot
        self.shape, self.form = shape, form or GraphForm()

    def _ops(self) -> TorchOps:
        buffers = self.named_buffers(remove_duplicate=False)
        return TorchOps({name.replace("__", "."): tensor for name, tensor in buffers})


class InferenceGraph(_Graph):
    """The scorer on padded rows."""

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw logits [rows, 1] in float32 (float64 where the weights are).

        Args:
            input_ids: int64 [rows, tokens].
            attention_mask: int64 [rows, tokens], 1 for real tokens, 0 for padding at the end of a row.
        """
        return Scorer(self._ops(), self.shape, self.form).logits(input_ids, attention_mask)


class PackedGraph(_Graph):
    """The scorer on sequences laid end to end."""

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, longest: Tensor) -> Tensor:
        """Raw logits [pairs, 1]; see `PackedScorer.packed_logits` for the arguments, all int64."""
        return PackedScorer(self._ops(), self.shape, self.form).packed_logits(input_ids, cu_seqlens, longest)
