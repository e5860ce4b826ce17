"""Our kernels for CPUs, called without an inference engine, against the formula in float64.

    python parity_tests/tools/kernel_cases.py LIBRARY

checks every variant that can run here with a few lengths and prints how many cases that were. The test of the
sanitizers does so with a library that they are compiled into. Only NumPy is needed.
"""

import ctypes
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HEADS, THETA = 2, 160000.0
LENGTHS = (1, 3, 17, 31, 32, 33, 64, 65, 130, 193, 257, 300, 700)
FEW_LENGTHS = (1, 3, 33, 65, 200)
NEON_VARIANTS = ("f32_neon", "int8_neon")
NEON_ROWS = ("f32_neon",)
ROWS = ("f32_avx2", "f32_avx512", "bf16_avx512", *NEON_ROWS)
VARIANTS = ("f32_avx2", "f32_avx512", "int8_avx2", "int8_avx512", "bf16_avx512", "bf16_amx", *NEON_VARIANTS)
# Mean and largest error that may be left when the rounding of queries, keys and values is in the formula, too: float32
# sums in another order, or weights of 8 bits. The largest is where the softmax is sharp and a rounding falls otherwise.
TOLERANCES = {"f32": (5e-6, 1e-3), "bf16": (2e-3, 0.2), "int8": (2e-3, 0.3)}


@dataclass(frozen=True)
class Case:
    """What attention computes."""

    head_dim: int
    window: int
    first_only: bool = False
    lengths: tuple[int, ...] = LENGTHS

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Where each sequence begins and the last ends."""
        return np.cumsum([0, *self.lengths]).astype(np.int64)


class Rows(NamedTuple):
    """What kernels on rows give."""

    stored: NDArray[Any]  # [rows, size]
    scales: NDArray[Any] | None = None  # of int8, [rows]: what 127 stands for

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any, rounds: bool) -> Self:
        if rounds:
            return cls(np.full(shape, 9, np.int8), np.full(shape[0], 9, dtype))
        return cls(np.full(shape, 9, dtype))

    @property
    def floats(self) -> Floats:
        return as_floats(self.stored) * (1.0 if self.scales is None else as_floats(self.scales)[:, None] / 127)


class Kernel:
    """The functions of the library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in (
            "ettin_can_run",
            "ettin_attend",
            "ettin_rows_can_run",
            "ettin_normalise",
            "ettin_gate",
            "ettin_attend_first",
        ):
            getattr(self._library, name).restype = ctypes.c_bool

    def can_run(self, variant: str) -> bool:
        return bool(self._library.ettin_can_run(variant.encode()))

    def attend(
        self,
        variant: str,
        case: Case,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        step: float = 0,
        rows: NDArray[np.int64] | None = None,
        scales: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Arrays are float32, or bf16 as uint16; `rows` and `scales`: of each token.

        The result is float32, or with a step int8.
        """
        assert q.dtype == k.dtype == v.dtype and q.dtype in (np.float32, np.uint16)
        shape = q.shape if rows is None else (len(rows), q.shape[1])
        out = np.full(shape, 9, dtype=np.int8 if step else q.dtype)
        assert self._attend(variant, case, [q, k, v], rows, scales, out, step), f"{variant} does not take {case}"
        return from_bf16(out) if out.dtype == np.uint16 else out

    def _attend(
        self, variant: str, case: Case, qkv: list[NDArray[Any]], rows: NDArray[np.int64] | None,
        scales: NDArray[Any] | None, out: NDArray[Any], step: float,
    ) -> bool:  # fmt: skip
        bounds = case.bounds
        pointers = [_pointer(x) for x in (*qkv, rows, scales, out, bounds)]
        return bool(
            self._library.ettin_attend(
                variant.encode(), ctypes.c_bool(qkv[0].dtype == np.uint16), *pointers, ctypes.c_int64(len(bounds) - 1),
                HEADS, case.head_dim, case.window, ctypes.c_float(THETA), ctypes.c_bool(case.first_only),
                ctypes.c_float(step),
            )
        )  # fmt: skip

    def can_run_rows(self, kernels: str) -> bool:
        return bool(self._library.ettin_rows_can_run(kernels.encode()))

    def normalise(
        self,
        kernels: str,
        x: NDArray[Any],
        added: NDArray[Any],
        eps: float,
        rounds: bool = False,
        scales: NDArray[Any] | None = None,
    ) -> tuple[Rows, Rows] | None:
        """The norm and the sum of x and added, whose rows are multiplied by scales [rows]; None: they don't take this.

        Arrays are float32, or bf16 as uint16 [rows, size]; the norm is int8 if it `rounds`.
        """
        normed, total = Rows.empty(x.shape, x.dtype, rounds), Rows.empty(x.shape, x.dtype, False)
        return (normed, total) if self._normalise(kernels, x, added, scales, eps, normed, total) else None

    def _normalise(
        self, kernels: str, x: NDArray[Any], added: NDArray[Any], scales: NDArray[Any] | None, eps: float,
        normed: Rows, total: Rows,
    ) -> bool:  # fmt: skip
        pointers = [_pointer(array) for array in (x, added, scales, total.stored, *normed)]
        size = (ctypes.c_int64(len(x)), x.shape[1])
        return bool(self._library.ettin_normalise(kernels.encode(), *pointers, *size, ctypes.c_float(eps)))

    def gate(
        self, kernels: str, joint: NDArray[Any], rounds: bool = False, scales: NDArray[Any] | None = None
    ) -> Rows | None:
        """gelu(up) · gate, of up and gate side by side [rows, 2 · size]; None: they don't take this.

        Both are multiplied by scales [rows]. The result is int8 if it `rounds`.
        """
        out = Rows.empty((len(joint), joint.shape[1] // 2), joint.dtype, rounds)
        return out if self._gate(kernels, joint, scales, out) else None

    def _gate(self, kernels: str, joint: NDArray[Any], scales: NDArray[Any] | None, out: Rows) -> bool:
        pointers = [_pointer(array) for array in (joint, scales, *out)]
        rows, size = out.stored.shape
        return bool(self._library.ettin_gate(kernels.encode(), *pointers, ctypes.c_int64(rows), size))

    def attend_first(
        self,
        kernels: str,
        case: Case,
        q: NDArray[Any],
        k: NDArray[Any],
        x: NDArray[Any],
        scales: NDArray[Any] | None = None,
    ) -> NDArray[Any] | None:
        """What first tokens attend to, [pairs, heads, size] as q; x is as q, or int8. None: they don't take this.

        Rows of k and of x are multiplied by scales [tokens].
        """
        out = np.full((len(q), HEADS, x.shape[1]), 9, q.dtype)
        return out if self._attend_first(kernels, case, q, k, x, scales, out) else None

    def _attend_first(
        self, kernels: str, case: Case, q: NDArray[Any], k: NDArray[Any], x: NDArray[Any],
        scales: NDArray[Any] | None, out: NDArray[Any],
    ) -> bool:  # fmt: skip
        bounds = case.bounds
        pointers = [_pointer(array) for array in (q, k, x, scales, out, bounds)]
        return bool(
            self._library.ettin_attend_first(
                kernels.encode(), *pointers[:3], ctypes.c_bool(x.dtype == np.int8), *pointers[3:],
                ctypes.c_int64(len(q)), HEADS, case.head_dim, case.window, ctypes.c_float(THETA), x.shape[1],
            )
        )  # fmt: skip


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


def inputs(case: Case, size: float, seed: int = 0) -> list[NDArray[np.float32]]:
    """Queries, whose size decides how sharp the softmax is, keys with a common part, and values; all fit into bf16."""
    random = np.random.default_rng(seed)
    shape = (sum(case.lengths), HEADS * case.head_dim)
    q, k, v = (random.standard_normal(shape, np.float32) for _ in "qkv")
    common = random.standard_normal(shape[1:], np.float32)
    return [from_bf16(to_bf16(x)) for x in (q * size, k + common, v + common)]


def expected(case: Case, products: str, q: Any, k: Any, v: Any) -> Floats:
    """softmax(rope(q) · rope(k)ᵀ) · v in float64, of queries, keys and values as the products round them."""
    outs = []
    for begin, end in itertools.pairwise(case.bounds.tolist()):
        heads = [x[begin:end].reshape(end - begin, HEADS, case.head_dim).swapaxes(0, 1) for x in (q, k, v)]
        if case.first_only and case.window >= 0:
            heads = [x[:, : case.window + 1] for x in heads]
        q_rows, k_rows, values = _rounded(products, *(_rotated(x) for x in heads[:2]), heads[2].astype(np.float64))
        scores = q_rows @ k_rows.swapaxes(1, 2)
        position = np.arange(scores.shape[1])
        if case.window >= 0:
            scores[:, abs(position[:, None] - position) > case.window] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ values
        outs.append(mixed.swapaxes(0, 1).reshape(len(position), -1)[: 1 if case.first_only else None])
    return np.concatenate(outs)


def _rotated(x: Any) -> Floats:
    half = x.shape[-1] // 2
    frequencies = (1 / np.float32(THETA) ** (np.arange(half, dtype=np.float32) / np.float32(half))).astype(np.float32)
    angles = (np.arange(x.shape[1], dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    left, right = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    return np.concatenate(
        [left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)], -1
    )


def _rounded(products: str, q: Floats, k: Floats, v: Floats) -> tuple[Floats, Floats, Floats]:
    if products == "bf16":
        log2e = np.log2(np.e)  # queries are rounded in powers of 2
        turned = (from_bf16(to_bf16(x.astype(np.float32))).astype(np.float64) for x in (q * log2e, k))
        return next(turned) / log2e, next(turned), v
    if products == "int8":
        some = k[:, ::4]
        k = k - (some.max(1, keepdims=True) + some.min(1, keepdims=True)) / 2
        centre, half = (v.max(1, keepdims=True) + v.min(1, keepdims=True)) / 2, np.ptp(v, axis=1, keepdims=True) / 2
        return _to_int8(q), _to_int8(k), centre + _to_int8(v - centre, half)
    return q, k, v


def _to_int8(x: Floats, largest: Floats | None = None) -> Floats:
    step = np.maximum(abs(x).max(-1, keepdims=True) if largest is None else largest, 1e-20) / 127
    return np.round(x / step) * step


def errors(kernel: Kernel, variant: str, case: Case, size: float) -> tuple[float, float]:
    """Mean and largest error of a variant."""
    q, k, v = inputs(case, size)
    wanted = expected(case, variant.partition("_")[0], q, k, v)
    if case.first_only:
        q = q[case.bounds[:-1]]
    arrays = [_stored(x, variant.startswith("bf16")) for x in (q, k, v)]
    error = abs(kernel.attend(variant, case, *arrays) - wanted)
    return float(error.mean()), float(error.max())


def grid(variant: str, lengths: tuple[int, ...]) -> list[tuple[Case, float]]:
    """All cases and sizes that a variant is checked with."""
    head_dims = (64,) if variant == "bf16_amx" else (64, 32)
    cases = [
        Case(head_dim, window, first_only, lengths)
        for head_dim in head_dims
        for window in (-1, 0, 5, 64)
        for first_only in (False, True)
    ]
    return list(itertools.product(cases, (0.125, 5.0)))


def check(kernel: Kernel, variant: str, lengths: tuple[int, ...] = LENGTHS) -> int:
    """Checks a variant; returns the number of cases."""
    of_mean, of_largest = TOLERANCES[variant.partition("_")[0]]
    cases = grid(variant, lengths)
    for case, size in cases:
        mean, largest = errors(kernel, variant, case, size)
        assert mean <= of_mean and largest <= of_largest, f"{variant}, {case}, size {size}: {mean:.1e}, {largest:.1e}"
    return len(cases)


def check_tables(kernel: Kernel, variant: str, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Checks that tokens whose rows lie anywhere give what they give in order, bit by bit."""
    case = Case(64, 64, lengths=lengths)
    tables = [_stored(x[:20], variant.startswith("bf16")) for x in inputs(case, 0.5)]
    rows = np.random.default_rng(0).integers(0, 20, sum(lengths))
    in_order = kernel.attend(variant, case, *(x[rows] for x in tables))
    assert np.array_equal(kernel.attend(variant, case, *tables, rows=rows), in_order), variant


def check_scales(kernel: Kernel, variant: str, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Checks that scales of rows give what rows give that are multiplied before, bit by bit: they are powers of 2."""
    is_bf16 = variant.startswith("bf16")
    for case in (Case(64, 64, False, lengths), Case(64, -1, True, lengths)):
        values = inputs(case, 0.5)
        scales = (2.0 ** np.random.default_rng(0).integers(-3, 3, sum(lengths))).astype(np.float32)
        multiplied = [x * scales[:, None] for x in values]
        if case.first_only:
            values[0] = multiplied[0] = values[0][case.bounds[:-1]]
        wanted = kernel.attend(variant, case, *(_stored(x, is_bf16) for x in multiplied))
        found = kernel.attend(variant, case, *(_stored(x, is_bf16) for x in values), scales=_stored(scales, is_bf16))
        assert np.array_equal(found, wanted), f"{variant}, {case}"
    # Values that any scale multiplies are rounded to nearest; where queries and keys are 0, nothing else is.
    case = Case(64, -1, lengths=lengths)
    nothing, values = _stored(np.zeros_like(inputs(case, 0.5)[0]), is_bf16), inputs(case, 0.5)[2]
    scales = as_floats(_stored(np.random.default_rng(1).random(len(values), np.float32), is_bf16)).astype(np.float32)
    wanted = kernel.attend(variant, case, nothing, nothing, _stored(values * scales[:, None], is_bf16))
    stored = (_stored(x, is_bf16) for x in (values, scales))
    assert np.array_equal(kernel.attend(variant, case, nothing, nothing, next(stored), scales=next(stored)), wanted)


def check_rows(kernel: Kernel, kernels: str) -> int:
    """Checks the kernels on rows; returns the number of cases."""
    random, cases = np.random.default_rng(0), itertools.product((32, 64, 256, 416, 1792), (False, True), (False, True))
    is_bf16 = kernels.startswith("bf16")
    count = 0
    for size, rounds, has_scales in cases:
        sizes = np.array([[1], [1e-3], [100], [0], [1]] * 5, np.float32)
        x = _stored(random.standard_normal((25, size), np.float32) * sizes + 3, is_bf16)
        added = _stored(random.standard_normal((25, size), np.float32) * sizes, is_bf16)
        scales = _stored(random.random(25, np.float32) + 0.01, is_bf16) if has_scales else None
        factors = as_floats(scales)[:, None] if scales is not None else np.ones((25, 1))
        found = kernel.normalise(kernels, x, added, 1e-5, rounds, scales)
        assert found, f"{kernels} do not take {size}"
        normed, total = found
        exact = as_floats(x) + as_floats(added) * factors
        _assert_near(total, exact, is_bf16)
        mean, deviation = total.floats.mean(-1, keepdims=True), np.sqrt(total.floats.var(-1, keepdims=True) + 1e-5)
        _assert_near(normed, (total.floats - mean) / deviation, is_bf16, abs(mean) * 2.0**-23 / deviation)

        joint = _stored(random.standard_normal((25, 2 * size), np.float32) * 4, is_bf16)
        gated = kernel.gate(kernels, joint, rounds, scales)
        assert gated is not None, f"{kernels} do not take {size}"
        up, gate = np.split(as_floats(joint) * factors, 2, axis=1)
        phi = np.vectorize(math.erf)(up / math.sqrt(2)) / 2 + 0.5
        _assert_near(gated, up * phi * gate, is_bf16, 4.1e-5 * abs(gate))
        count += 2
    return count


def check_first(kernel: Kernel, kernels: str, lengths: tuple[int, ...] = FEW_LENGTHS) -> int:
    """Checks attention of first tokens; returns the number of cases."""
    is_bf16, random, count = kernels.startswith("bf16"), np.random.default_rng(0), 0
    for head_dim, window, size in itertools.product((32, 64), (-1, 0, 64), (32, 96, 256)):
        case = Case(head_dim, window, True, lengths)
        q, k, _ = (_stored(each, is_bf16) for each in inputs(case, 1.0))
        rows = random.integers(-128, 128, (len(k), size)).astype(np.int8)
        for x in (rows, _stored(rows.astype(np.float32) / 64, is_bf16)):
            found = kernel.attend_first(kernels, case, q[case.bounds[:-1]], k, x)
            assert found is not None, f"{kernels} do not take {case}"
            _assert_near(Rows(found), first_rows(case, as_floats(q), as_floats(k), as_floats(x)), is_bf16, 2e-4)
            count += 1
        scales = (2.0 ** random.integers(-3, 3, len(k))).astype(np.float32)
        multiplied = (_stored((as_floats(x) * scales[:, None]).astype(np.float32), is_bf16) for x in (k, rows))
        wanted = kernel.attend_first(kernels, case, q[case.bounds[:-1]], *multiplied)
        found = kernel.attend_first(kernels, case, q[case.bounds[:-1]], k, rows, _stored(scales, is_bf16))
        assert found is not None and np.array_equal(found, wanted), f"{kernels}, {case}"
    return count


def first_rows(case: Case, q: Floats, k: Floats, x: Floats) -> Floats:
    """softmax(rope(q) · rope(k)ᵀ) · x of each sequence's first token in float64: [pairs, heads, size]."""
    outs = []
    for begin, end in itertools.pairwise(case.bounds.tolist()):
        seen = slice(begin, min(end, begin + case.window + 1) if case.window >= 0 else end)
        queries, keys = (_rotated(each[seen].reshape(-1, HEADS, case.head_dim).swapaxes(0, 1)) for each in (q, k))
        scores = (queries[:, :1] @ keys.swapaxes(1, 2))[:, 0]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outs.append(weights / weights.sum(-1, keepdims=True) @ x[seen])
    return np.array(outs)


def check_extremes(kernel: Kernel, kernels: str) -> None:
    """Checks what no int8 can hold, and a first element that is far from the others."""
    is_bf16 = kernels.startswith("bf16")
    joint = np.full((1, 64), 1e12, np.float32)
    joint[0, 32:] = [1e20, -1e20, 1e6, -1e6] * 8
    gated = kernel.gate(kernels, _stored(joint, is_bf16), rounds=True)
    assert gated and gated.stored[0].tolist() == [127, -127, 0, 0] * 8
    nothing = kernel.gate(kernels, np.zeros_like(_stored(joint, is_bf16)), rounds=True)
    assert nothing and not nothing.stored.any() and np.isfinite(nothing.floats).all()
    x = np.random.default_rng(0).standard_normal((2, 256), np.float32)
    x[:, 0] = [300, -300]
    found = kernel.normalise(kernels, _stored(x, is_bf16), _stored(np.zeros_like(x), is_bf16), 1e-5)
    assert found
    normed, total = found
    exact = (total.floats - total.floats.mean(-1, keepdims=True)) / total.floats.std(-1, keepdims=True)
    _assert_near(normed, exact, is_bf16, 256 * 2.0**-23 * abs(exact))


def _stored(x: NDArray[np.float32], is_bf16: bool) -> NDArray[Any]:
    return to_bf16(x) if is_bf16 else x


def as_floats(x: NDArray[Any]) -> Floats:
    return (from_bf16(x) if x.dtype == np.uint16 else x).astype(np.float64)


def _assert_near(found: Rows, exact: Floats, is_bf16: bool, error: Floats | float = 0.0) -> None:
    """As near as float32 sums and the elements allow: whole multiples of a row's step, bf16 or float32."""
    if found.scales is None:
        room = error + abs(exact) * (0.502 / 128 if is_bf16 else 2e-6) + 2e-6
    else:
        largest, scales = abs(exact).max(-1), as_floats(found.scales)
        near = (0.502 / 128 if is_bf16 else 1e-4) * largest + np.broadcast_to(error, exact.shape).max(-1) + 1e-6
        assert (abs(scales - largest) <= near).all(), "a scale"
        room = error + 0.51 * scales[:, None] / 127 + 1e-6
    assert (abs(found.floats - exact) <= room).all(), f"{abs(found.floats - exact).max()}"


def main() -> None:
    kernel = Kernel(Path(sys.argv[1]))
    for name in VARIANTS:
        count = 0
        if kernel.can_run(name):
            count = check(kernel, name, FEW_LENGTHS)
            check_tables(kernel, name, FEW_LENGTHS)
            check_scales(kernel, name, FEW_LENGTHS)
        sys.stdout.write(f"{name}: {count} cases\n")
    for name in ROWS:
        count = check_rows(kernel, name) + check_first(kernel, name) if kernel.can_run_rows(name) else 0
        sys.stdout.write(f"rows, {name}: {count} cases\n")


if __name__ == "__main__":
    main()
