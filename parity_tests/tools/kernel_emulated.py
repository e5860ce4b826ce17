"""The kernels for 64-bit ARM on another processor: cross-compiled, and run by QEMU's emulation of one.

It shows that the results are right, and says nothing about the speed. Debian has both programs:
`apt-get install g++-aarch64-linux-gnu qemu-user`.
"""

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from kernel_cases import HEADS, THETA, Case, Kernel, Rows
from numpy.typing import NDArray

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # of Debian's cross compiler, for what is not linked into the program
SOURCES = ("f32_neon.cpp", "int8_neon.cpp", "ragged_attention.cpp", "rows.cpp", "rows_f32_neon.cpp")
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libasan", "-static-libubsan")
_REQUEST = struct.Struct("16s16s13q2f")  # see kernel_emulated.cpp


def missing() -> str | None:
    """What is not installed, of what this needs."""
    return ", ".join(name for name in (COMPILER, EMULATOR) if shutil.which(name) is None) or None


def build(sources: Path, folder: Path, flags: Sequence[str] = ("-O3", "-static")) -> Path:
    """Compiles the kernel in `sources`; returns the program."""
    program = folder / "kernel_emulated"
    files = [*(sources / name for name in SOURCES), Path(__file__).with_suffix(".cpp")]
    objects = [folder / f"{path.stem}.o" for path in files]
    running = [
        subprocess.Popen([COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, "-c", path, "-o", compiled])
        for path, compiled in zip(files, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(files)
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    return program


class EmulatedKernel(Kernel):
    """The functions of the program, on the named processor of QEMU."""

    def __init__(self, program: Path, cpu: str = "max") -> None:
        self._process = subprocess.Popen(
            [EMULATOR, "-cpu", cpu, "-L", LIBRARIES, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={"ASAN_OPTIONS": "detect_leaks=0"},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def can_run(self, variant: str) -> bool:
        return self._answer(variant, "can_run", [])

    def _attend(
        self, variant: str, case: Case, qkv: list[NDArray[Any]], rows: NDArray[np.int64] | None,
        scales: NDArray[Any] | None, out: NDArray[Any], step: float,
    ) -> bool:  # fmt: skip
        sizes = (len(case.lengths), HEADS, case.head_dim, case.window, case.first_only)
        floats = (THETA, step)
        return self._answer(
            variant, "attend", [out], *qkv, case.bounds, rows, scales=scales, sizes=sizes, floats=floats
        )

    def can_run_rows(self, kernels: str) -> bool:
        return self._answer(kernels, "rows_can_run", [])

    def _normalise(
        self, kernels: str, x: NDArray[Any], added: NDArray[Any], scales: NDArray[Any] | None, eps: float,
        normed: Rows, total: Rows,
    ) -> bool:  # fmt: skip
        sizes = (*x.shape, 0, 0, normed.scales is not None)
        outs = [*_there(normed), total.stored]
        return self._answer(kernels, "normalise", outs, x, added, scales=scales, sizes=sizes, floats=(eps, 0))

    def _gate(self, kernels: str, joint: NDArray[Any], scales: NDArray[Any] | None, out: Rows) -> bool:
        sizes = (*out.stored.shape, 0, 0, out.scales is not None)
        return self._answer(kernels, "gate", _there(out), joint, scales=scales, sizes=sizes)

    def _attend_first(
        self, kernels: str, case: Case, q: NDArray[Any], k: NDArray[Any], x: NDArray[Any],
        scales: NDArray[Any] | None, out: NDArray[Any],
    ) -> bool:  # fmt: skip
        sizes, floats = (len(q), HEADS, case.head_dim, case.window, x.dtype == np.int8), (THETA, x.shape[1])
        return self._answer(kernels, "first", [out], q, k, x, case.bounds, scales=scales, sizes=sizes, floats=floats)

    def _answer(
        self,
        variant: str,
        function: str,
        outs: Sequence[NDArray[Any]],
        *arrays: NDArray[Any] | None,
        scales: NDArray[Any] | None = None,
        sizes: Sequence[int] = (0,) * 5,
        floats: tuple[float, float] = (0, 0),
    ) -> bool:
        """Whether the function took what it was given; `outs` have what it gives."""
        places = (*arrays, *[None] * (5 - len(arrays)), scales)
        given = [b"" if array is None else array.tobytes() for array in places]
        counts = [*map(len, given), sum(out.nbytes for out in outs)]
        is_bf16 = bool(arrays) and arrays[0] is not None and arrays[0].dtype == np.uint16
        request = _REQUEST.pack(variant.encode(), function.encode(), is_bf16, *sizes, *counts, *floats)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(b"".join([request, *given]))
        self._process.stdin.flush()
        done = self._process.stdout.read(1)
        assert len(done) == 1, f"the program ended: {self._process.wait()}"
        for out in outs:
            out[...] = np.frombuffer(self._process.stdout.read(out.nbytes), out.dtype).reshape(out.shape)
        return done == b"\1"


def _there(rows: Rows) -> list[NDArray[Any]]:
    return [array for array in rows if array is not None]
