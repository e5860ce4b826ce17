"""The project's own attention kernel for OpenVINO: `kernels/`, compiled when the package is installed.

It needs Linux on x86-64 with AMX, and the very version of OpenVINO that it was compiled against, whose C++ interface it
uses. Anywhere else OpenVINO's own attention runs, from the same artifact. An export needs the library, but no AMX.
"""

import ctypes
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from ettin.runtimes.machine import has_amx_bf16

LIBRARY = "ettin.runtimes.engines.openvino_kernels_library"
RAGGED_NAME = "openvino_ragged.xml"  # the graph that uses the kernels, beside the one that does not
HEAD_DIM = 64  # the only head dimension that the kernels know; all released sizes have it
SWITCH = "ETTIN_OPENVINO_KERNELS"  # "off": the kernels are not used


class Problem(NamedTuple):
    """Why the kernels can't be used, and whether installing the package again would help."""

    why: str
    install_again: bool = False


def kernels() -> Path | None:
    """The library, for `ov.Core.add_extension`; None where it can't run (`problem` says why)."""
    return None if problem() else compiled()


def compiled() -> Path | None:
    """The library, to export graphs with; None: not compiled, or for another OpenVINO."""
    library = _compiled()
    return None if isinstance(library, Problem) else library


def problem() -> Problem | None:
    """Why the kernels can't be used here; None: they can."""
    if os.environ.get(SWITCH) == "off":
        return Problem(f"switched off by {SWITCH}")
    if not has_amx_bf16():
        return Problem("no AMX, or switched off by ONEDNN_MAX_CPU_ISA")
    library = _compiled()
    if isinstance(library, Problem):
        return library
    can_run = ctypes.CDLL(str(library)).ettin_has_amx_bf16
    can_run.restype = ctypes.c_bool
    return None if can_run() else Problem("the system does not let this process use AMX")


def _library() -> Path | None:
    spec = importlib.util.find_spec(LIBRARY)
    return Path(spec.origin) if spec and spec.origin else None


def _compiled() -> Path | Problem:
    library = _library()
    if library is None:
        return Problem("not compiled at installation, which needs g++ 11 or later", install_again=True)
    import openvino  # what the library is linked to must be there first

    try:
        ctypes.CDLL(str(library))
    except OSError:
        version = openvino.__version__.split("-")[0]
        return Problem(f"compiled for another OpenVINO than {version}", install_again=True)
    return library
