"""Part (d): calls of the attention kernel alone, against its formula and against the fastest bf16 matrix product."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from ettin.bench.peaks import gpu_peaks
from ettin.gpu.visit.models import kernel_on, plain_varlen
from ettin.gpu.visit.report import Report, Task
from ettin.gpu.visit.speed import shape_of

_LENGTHS = (64, 180, 512, 2048)
_TOKENS = 65536  # of a call, all sequences together
_MIXED = (1, 2, 63, 64, 65, 66, 127, 128, 129, 130, 300, 1030)  # lengths around those where a window begins to matter


def run(task: Task, report: Report) -> None:
    """Checks the kernel on sequences of many lengths, then times it at the shapes of the sizes."""
    is_gpu, kernel = task.device == "cuda", kernel_on(task.device)
    torch.manual_seed(0)
    for size in task.sizes:
        shape = shape_of(size)
        heads, width, side = shape.num_heads, shape.head_dim, shape.window_tokens
        call = _Calls(kernel, task.device, heads, width, side)
        report.attempt(f"{size}, against the formula", call.errors)
    peaks = report.attempt("peak_gflop_per_s", gpu_peaks if is_gpu else dict) or {}
    lengths, tokens = (_LENGTHS, _TOKENS) if is_gpu else (_LENGTHS[:2], 512)
    for size in task.sizes:
        shape = shape_of(size)
        call = _Calls(kernel, task.device, shape.num_heads, shape.head_dim, shape.window_tokens)
        report.attempt(size, partial(call.speeds, lengths, tokens, peaks.get("bf16")))


class _Calls:
    """Calls of a kernel at the shape of one size; `side`: tokens that a token of a local layer sees to each side."""

    def __init__(self, kernel: Callable[..., Tensor], device: str, heads: int, width: int, side: int) -> None:
        self._kernel, self._device, self._heads, self._width, self._side = kernel, device, heads, width, side

    def _tensors(self, tokens: int, *more: int) -> Iterator[Tensor]:
        for count in (tokens, *more):
            # Standard deviation 1 of the scores: the graph's queries are scaled already.
            values = torch.randn(count, self._heads, self._width, device=self._device, dtype=torch.bfloat16)
            yield values * self._width**-0.25

    def _bounds(self, lengths: tuple[int, ...] | list[int]) -> Tensor:
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=self._device)

    def errors(self) -> dict[str, Any]:
        """Largest |Δ| from the formula in float32, and of the formula in bf16, of all three kinds of calls."""
        tokens, bounds, one_each = sum(_MIXED), self._bounds(_MIXED), self._bounds([1] * len(_MIXED))
        q, k, v, lone = self._tensors(tokens, tokens, tokens, len(_MIXED))
        whole, window = (-1, -1), (self._side, self._side)
        found = {}
        for name, query, starts, longest, size in (
            ("global", q, bounds, max(_MIXED), whole),
            ("local", q, bounds, max(_MIXED), window),
            ("global, first tokens", lone, one_each, 1, whole),
        ):
            arguments = (starts, bounds, longest, max(_MIXED))
            options: dict[str, Any] = {"scale": 1.0, "window_size": size}
            expected = plain_varlen(query.float(), k.float(), v.float(), *arguments, **options)
            mixed = self._kernel(query, k, v, *arguments, **options).float()
            plain = plain_varlen(query, k, v, *arguments, **options).float()
            found[name] = {"kernel": _largest(mixed - expected), "formula in bf16": _largest(plain - expected)}
        return found

    def speeds(self, lengths: tuple[int, ...], tokens: int, peak: float | None) -> list[dict[str, Any]]:
        """Time of calls in milliseconds, work in 10⁹ operations per second, and its share of the peak."""
        rows = []
        for length, is_global in product(lengths, (True, False)):
            count = max(1, tokens // length)
            q, k, v = self._tensors(*[count * length] * 3)
            side = -1 if is_global else self._side
            variables = {
                "kernel": self._kernel, "q": q, "k": k, "v": v, "bounds": self._bounds([length] * count),
                "longest": length, "options": {"scale": 1.0, "window_size": (side, side)},
            }  # fmt: skip
            timer = Timer("kernel(q, k, v, bounds, bounds, longest, longest, **options)", globals=variables)
            seconds = min(timer.blocked_autorange(min_run_time=0.1).times)
            gflop = count * self._gflop(length, length if is_global else self._side)
            row = {"tokens": length, "sequences": count, "window": None if is_global else self._side}
            rows.append({**row, "milliseconds": 1000 * seconds, "gflop_per_s": gflop / seconds})
            rows[-1]["share_of_peak"] = gflop / seconds / peak if peak else None
        return rows

    def _gflop(self, length: int, side: int) -> float:
        """Of a sequence: two products for each query and each key that it sees."""
        seen = sum(min(length, at + side + 1) - max(0, at - side) for at in range(length))
        return 4e-9 * seen * self._heads * self._width


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
