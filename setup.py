"""What `pyproject.toml` can't say: the kernels for CPUs are compiled where OpenVINO's headers are installed."""

import importlib.util
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

_KERNELS = Path("runtimes/engines/kernels")
# Instruction sets by processor. A file whose name ends with one is compiled for processors of that kind alone.
_INSTRUCTIONS = {"x86_64": ("avx2", "avx512", "amx"), "aarch64": ("neon",)}
# GCC 12 warns of its own intrinsics.
_WARNINGS = ("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-ignored-attributes")


def extensions() -> list[Extension]:
    """The kernels for CPUs, where they can run; without them (no compiler) an install is whole, but slower.

    They are linked to nothing of OpenVINO: what they need of that is loaded before them (`openvino_kernels`), so that
    they outlive a release. ETTIN_PURE_WHEEL leaves them out, for a wheel that any platform takes.
    """
    spec = importlib.util.find_spec("openvino")
    machine = platform.machine()
    is_known = sys.platform == "linux" and machine in _INSTRUCTIONS and not os.environ.get("ETTIN_PURE_WHEEL")
    if not is_known or spec is None or spec.origin is None:
        return []
    of_others = {name for other, names in _INSTRUCTIONS.items() if other != machine for name in names}
    return [
        Extension(
            "ettin.runtimes.engines.openvino_kernels_library",
            sources=[str(path) for path in sorted(_KERNELS.glob("*.cpp")) if path.stem.split("_")[-1] not in of_others],
            depends=sorted(map(str, _KERNELS.glob("*.hpp"))),
            include_dirs=[str(Path(spec.origin).parent / "include")],
            define_macros=[("OV_THREAD", "OV_THREAD_TBB_ADAPTIVE")],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", *_WARNINGS],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ]


_EXTENSIONS = extensions()
setup(ext_modules=_EXTENSIONS, options={"bdist_wheel": {"py_limited_api": "cp311"}} if _EXTENSIONS else {})
