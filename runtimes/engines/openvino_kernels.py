"""The project's own kernels for OpenVINO: `kernels/`, compiled when the package is installed.

They run on Linux on x86-64 and 64-bit ARM, in the best of the variants that the processor has. They use the C++
interface of OpenVINO, which changes between releases: they are used with those that they were tested with and with the
one that they were compiled for. Anywhere else OpenVINO's own nodes run, from the same artifact.
"""

import ctypes
import functools
import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ettin.runtimes.machine import is_allowed, isa_limit

LIBRARY = "ettin.runtimes.engines.openvino_kernels_library"
RAGGED_NAME = "openvino_ragged.xml"  # the graph that uses the kernel, beside the one that does not
OPERATION = "RaggedAttention"  # in that graph
HEAD_DIMS = (32, 64)  # of the heads that the kernel knows; all released sizes have 64
ROW_MULTIPLE = 32  # sizes of rows that the kernels know are whole multiples of this
SWITCH = "ETTIN_OPENVINO_KERNELS"  # "off": the kernel is not used; "f32", "bf16" or "int8": only with these products
_INTERFACE = 3  # of the library, see openvino_extension.cpp
_TESTED_RELEASES = (202602, 202603, 202604)  # of OpenVINO, see test_releases.py


class Variant(NamedTuple):
    """One way to compute attention."""

    name: str  # in the library
    products: str  # precision of its products
    floats: tuple[str, ...]  # precisions of queries, keys, values and results
    isa: str  # the instruction set; on x86-64 by oneDNN's name
    rounds: bool = True  # whether it can round its results to int8
    head_dims: tuple[int, ...] = HEAD_DIMS


# The best of each kind of products first.
_VARIANTS = (
    Variant("bf16_amx", "bf16", ("bf16",), "AVX512_CORE_AMX", rounds=False, head_dims=(64,)),
    Variant("bf16_avx512", "bf16", ("bf16",), "AVX512_CORE_BF16"),
    Variant("int8_avx512", "int8", ("f32",), "AVX512_CORE_VNNI"),
    Variant("int8_avx2", "int8", ("f32",), "AVX2_VNNI"),
    Variant("int8_neon", "int8", ("f32",), "NEON_DOTPROD"),
    Variant("f32_avx512", "f32", ("f32",), "AVX512_CORE"),
    Variant("f32_avx2", "f32", ("f32",), "AVX2"),
    Variant("f32_neon", "f32", ("f32",), "NEON"),
)
# By the floats that they take, the best first: the name in the library, and the instruction set.
_ROW_KERNELS = {
    "bf16": {"bf16_avx512": "AVX512_CORE_BF16"},
    "f32": {"f32_avx512": "AVX512_CORE", "f32_avx2": "AVX2", "f32_neon": "NEON"},
}


class Problem(NamedTuple):
    """Why the kernel can't be used, and whether installing the package again would help."""

    why: str
    install_again: bool = False


def variant(products: str, floats: str, head_dim: int) -> Variant | None:
    """The best variant for these products, floats and heads that can run here; None: there is none."""
    of_products = (each for each in runnable() if each.products == products)
    return next((each for each in of_products if floats in each.floats and head_dim in each.head_dims), None)


def row_kernels(floats: str) -> str | None:
    """The best kernels for what lies between products, with these floats, that can run here; None: there are none."""
    library = compiled()
    if library is None:
        return None
    usable = (name for name, isa in _ROW_KERNELS[floats].items() if _can_run(library, "ettin_rows_can_run", name, isa))
    return next(usable, None)


def runnable(products: str | None = None) -> list[Variant]:
    """The variants that can run here, the best of each kind of products first.

    Args:
        products: all that are allowed, "" for any; None: those that the user's switch names.
    """
    switch = os.environ.get(SWITCH, "")
    allowed = switch if products is None else products
    library = compiled()
    if library is None or switch == "off":
        return []
    return [
        each
        for each in _VARIANTS
        if allowed in ("", each.products) and _can_run(library, "ettin_can_run", each.name, each.isa)
    ]


def _can_run(library: Path, function: str, name: str, isa: str) -> bool:
    """Whether the library's function says that this processor runs what has this name, and no limit forbids it."""
    can_run = getattr(ctypes.CDLL(str(library)), function)
    can_run.restype = ctypes.c_bool
    return is_allowed(isa) and bool(can_run(name.encode()))


def compiled() -> Path | None:
    """The library, for `ov.Core.add_extension`; None: not compiled, or for another OpenVINO."""
    library = _compiled()
    return None if isinstance(library, Problem) else library


def problem() -> Problem | None:
    """Why the kernel can't be used here; None: it can."""
    if os.environ.get(SWITCH) == "off":
        return Problem(f"switched off by {SWITCH}")
    library = _compiled()
    if isinstance(library, Problem):
        return library
    if runnable():
        return None
    if runnable(""):
        return Problem(f"switched off by {SWITCH}={os.environ[SWITCH]}: nothing computes such products here")
    return Problem(f"switched off by ONEDNN_MAX_CPU_ISA={isa_limit()}" if isa_limit() else "the processor has no AVX2")


def _library() -> Path | None:
    spec = importlib.util.find_spec(LIBRARY)
    return Path(spec.origin) if spec and spec.origin else None


def _compiled() -> Path | Problem:
    library = _library()
    if library is None:
        return Problem("not compiled at installation, which needs g++ 11 or later", install_again=True)
    import openvino

    year, number = map(int, openvino.__version__.split(".")[:2])
    releases: tuple[int, ...] = ()
    with suppress(OSError):  # it calls functions that are not there
        loaded = _loaded(library, Path(openvino.__file__).parent / "libs")
        if not hasattr(loaded, "ettin_interface") or loaded.ettin_interface() != _INTERFACE:
            return Problem("compiled by another version of this package", install_again=True)
        releases = (*_TESTED_RELEASES, loaded.ettin_openvino_release())
    if year * 100 + number not in releases:
        return Problem(f"not tested with OpenVINO {year}.{number}, and compiled for another", install_again=True)
    return library


@functools.cache
def _loaded(library: Path, libraries: Path) -> ctypes.CDLL:
    """The library. What it calls of OpenVINO is loaded first, because it is not linked to any version of that."""
    for pattern in ("libtbb.so.*", "libopenvino.so.*"):
        for path in libraries.glob(pattern):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library), mode=os.RTLD_NOW)
