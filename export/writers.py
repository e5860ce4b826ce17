"""Which function writes which target. Importing this needs no torch."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ettin.artifacts.errors import MissingDependency

if TYPE_CHECKING:  # imports torch
    from ettin.export.lowering import Lowering


@dataclass(frozen=True)
class Writer:
    """How a target is written.

    Args:
        implementation: "module:function".
        packages: the packages that it imports, by module name.
        extra: the extra that installs them.
        verify_also: by precision, variables of a second verification: what other machines will make of the artifact.
    """

    implementation: str
    packages: tuple[str, ...]
    extra: str
    verify_also: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


# An instruction set without bf16 arithmetic: OpenVINO then computes with a bf16 artifact's weights in f32.
_WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}

WRITERS = {
    "onnx": Writer("ettin.export.to_onnx:onnx_from_checkpoint", ("onnx",), "export"),
    "openvino": Writer(
        "ettin.export.to_openvino:openvino_from_checkpoint",
        ("openvino",),
        "openvino",
        {"bf16": _WITHOUT_BF16, "int8": _WITHOUT_BF16},
    ),
    "transformers": Writer(
        "ettin.export.to_transformers:transformers_from_checkpoint", ("safetensors", "transformers"), "export"
    ),
}


def lowering(target: str) -> "Lowering":
    """The function that writes `target`.

    Raises:
        MissingDependency: a package that it needs is not installed.
    """
    writer = WRITERS[target]
    for package in writer.packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise MissingDependency(f"target '{target}'", package, writer.extra) from None
    module, name = writer.implementation.split(":")
    function: Lowering = getattr(importlib.import_module(module), name)
    return function
