"""Which function writes which target. Importing this needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ettin.runtimes.openvino_kernels import SWITCH
from ettin.runtimes.registry import Engine

if TYPE_CHECKING:  # imports torch
    from ettin.export.lowering import Lowering


@dataclass(frozen=True)
class Writer(Engine):
    """How a target is written.

    Args:
        verify_also: by precision, variables of further verifications: what other machines will make of the artifact.
        proof: the target whose fp32 form proves the graph; None: its own.
    """

    verify_also: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    proof: str | None = None


# OpenVINO's own attention instead of our kernel, and an instruction set without bf16 arithmetic: OpenVINO then computes
# with a bf16 artifact's weights in f32.
_ELSEWHERE = ({SWITCH: "off"}, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"})

WRITERS = {
    "onnx": Writer("ettin.export.to_onnx:onnx_from_checkpoint", ("onnx",), "export"),
    "openvino": Writer(
        "ettin.export.to_openvino:openvino_from_checkpoint",
        ("openvino",),
        "openvino",
        {"bf16": _ELSEWHERE, "int8": _ELSEWHERE},
    ),
    "transformers": Writer(
        "ettin.export.to_transformers:transformers_from_checkpoint", ("safetensors", "transformers"), "export"
    ),
    "trt": Writer("ettin.export.to_tensorrt:trt_from_checkpoint", ("onnx",), "export", proof="packed"),
    "trt-rtx": Writer("ettin.export.to_tensorrt:trt_rtx_from_checkpoint", ("onnx",), "export", proof="packed"),
    # Not a target for users: an `onnx` artifact of the packed graph.
    "packed": Writer("ettin.export.to_tensorrt:packed_from_checkpoint", ("onnx",), "export"),
}


def lowering(target: str) -> "Lowering":
    """The function that writes `target`, or "packed".

    Raises:
        MissingDependency: a package that it needs is not installed.
    """
    function: Lowering = WRITERS[target].imported(target)
    return function
