"""The graph's steps between products and attention, each fused into one kernel in the Triton language.

They read and write each tensor once, in its type, and compute in float32. No GPU has run them. On a CPU, tests run them
in Triton's interpreter (TRITON_INTERPRET=1), which cuts float32 to bf16 where a GPU rounds to nearest, and compile them
for several GPUs to see that their loads and stores take 16 bytes and that no register is spilled.
"""

# The language has annotations of its own:
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ettin.gpu.engines.flash import Steps

_TILE = 2048  # elements of a program
_WARP = 256  # elements of a warp, where a program has few: each of its threads then loads 8, 16 bytes of bf16


@triton.jit
def added_kernel(
    x, change, total, normed, rows, eps, width: tl.constexpr, at_once: tl.constexpr, columns: tl.constexpr
) -> None:  # fmt: skip
    """Rows of total = x + change, rounded to their type, and of their norm, from the rounded values."""
    row = tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once)[:, None]
    column = tl.arange(0, columns)[None, :]
    at, inside = row * width + column, (row < rows) & (column < width)
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(change + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (left + right).to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    value = rounded.to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=1, keep_dims=True) / width, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / width
    tl.store(normed + at, (centred * tl.rsqrt(variance + eps)).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def rotated_kernel(
    heads, cos, sin, positions, row: tl.constexpr, count: tl.constexpr, half: tl.constexpr,
    counts: tl.constexpr, halves: tl.constexpr,
) -> None:  # fmt: skip
    """Rotates the first count heads of one token in place; a row of all its heads has row elements."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, counts)[:, None], tl.arange(0, halves)[None, :]
    angle, inside = tl.load(positions + token).to(tl.int64) * (2 * half) + column, column < half
    # Both halves of a row of the tables are the same.
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0)
    first = heads + token * row + head * (2 * half) + column
    inside = (head < count) & inside
    left = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (left * cosine - right * sine).to(heads.dtype.element_ty), mask=inside)
    tl.store(first + half, (right * cosine + left * sine).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(up_gate, result, elements, width: tl.constexpr, at_once: tl.constexpr) -> None:
    """GELU(up) × gate, for elements of the result counted through all rows."""
    element = tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once)
    inside = element < elements
    up_at = element + element // width * width
    up = tl.load(up_gate + up_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(up_gate + up_at + width, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * up * (1.0 + tl.math.erf(up * 0.7071067811865476))
    tl.store(result + element, (gelu * gate).to(result.dtype.element_ty), mask=inside)


class TritonSteps(Steps):
    """See `Steps`; for tensors of a CUDA device, in bf16, fp16 or fp32."""

    def rope(self, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return cos, sin, positions

    def rotated(self, heads: Tensor, count: int, rope: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = heads.contiguous()
        tokens, parts, num_heads, head_dim = heads.shape
        counts, halves = triton.next_power_of_2(count * num_heads), triton.next_power_of_2(head_dim // 2)
        warps = min(8, max(1, counts * halves // _WARP))
        row = parts * num_heads * head_dim
        rotated_kernel[(tokens,)](
            heads, *rope, row, count * num_heads, head_dim // 2, counts, halves, num_warps=warps
        )  # fmt: skip
        return heads.unbind(1)

    def added(self, x: Tensor, change: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, change = x.contiguous(), change.contiguous()
        rows, width = x.shape
        columns = triton.next_power_of_2(width)
        at_once = max(1, _TILE // columns)
        total, normed = torch.empty_like(x), torch.empty_like(x)
        added_kernel[(triton.cdiv(rows, at_once),)](x, change, total, normed, rows, eps, width, at_once, columns)
        return total, normed

    def gated(self, up_gate: Tensor) -> Tensor:
        up_gate = up_gate.contiguous()
        rows, width = up_gate.shape[0], up_gate.shape[1] // 2
        result = up_gate.new_empty(rows, width)
        gated_kernel[(triton.cdiv(rows * width, _TILE),)](up_gate, result, rows * width, width, _TILE)
        return result
