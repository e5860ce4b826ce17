"""What every result says about where it was measured."""

import platform
import sys

from ettin.artifacts.versions import installed_versions
from ettin.runtimes import cpu

_PACKAGES = (
    "ettin-export",
    "numpy",
    "onnxruntime",
    "openvino",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)


def machine() -> dict[str, object]:
    """Processor, its instruction sets, and versions."""
    return {
        "cpu": cpu.model_name(),
        "cpus_usable": cpu.available_cpus(),
        "isa": [flag for flag in cpu.INTERESTING if flag in cpu.flags()],
        "isa_limit": cpu.isa_limit(),
        "python": platform.python_version(),
        "system": sys.platform,
        "versions": installed_versions(_PACKAGES),
    }
