"""What `pyproject.toml` can't say: the attention kernel is compiled against the OpenVINO of the build environment."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

_KERNELS = Path("runtimes/engines/kernels")


def extensions() -> list[Extension]:
    """The attention kernel, where it can run; without it (no compiler) an install is whole, but slower with AMX."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    import openvino

    root = Path(openvino.__file__).parent
    libraries = [next((root / "libs").glob(f"{name}.so.*")) for name in ("libopenvino", "libtbb")]
    return [
        Extension(
            "ettin.runtimes.engines.openvino_kernels_library",
            sources=sorted(map(str, _KERNELS.glob("*.cpp"))),
            depends=sorted(map(str, _KERNELS.glob("*.hpp"))),
            include_dirs=[str(root / "include")],
            define_macros=[("OV_THREAD", "OV_THREAD_TBB_ADAPTIVE")],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-w"],
            extra_link_args=[str(each) for each in libraries],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ]


setup(ext_modules=extensions(), options={"bdist_wheel": {"py_limited_api": "cp311"}})
