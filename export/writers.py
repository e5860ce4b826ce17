"""Which function writes which target. Importing this needs no torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ettin.runtimes.engines.openvino_kernels import SWITCH, kernels
from ettin.runtimes.loading import Engine
from ettin.runtimes.machine import has_bf16

if TYPE_CHECKING:  # imports torch
    from ettin.export.lowering import Lowering


@dataclass(frozen=True)
class Writer(Engine):
    """How a target is written.

    Args:
        elsewhere: by precision, variables under which this machine computes as others will: verified, too.
        proof: the target whose fp32 form proves the graph; None: its own.
    """

    elsewhere: Callable[[str], Iterator[Mapping[str, str]]] = lambda _: iter(())
    proof: str | None = None


def _openvino_elsewhere(precision: str) -> Iterator[Mapping[str, str]]:
    if precision == "fp32":
        return
    if kernels():
        yield {SWITCH: "off"}
    if has_bf16():  # without it OpenVINO computes with a bf16 artifact's weights in f32
        yield {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}


WRITERS = {
    "onnx": Writer("ettin.export.targets.to_onnx:onnx_from_checkpoint", ("onnx",), "export"),
    "openvino": Writer(
        "ettin.export.targets.to_openvino:openvino_from_checkpoint", ("openvino",), "openvino", _openvino_elsewhere
    ),
    "transformers": Writer(
        "ettin.export.targets.to_transformers:transformers_from_checkpoint", ("safetensors", "transformers"), "export"
    ),
    "trt": Writer("ettin.export.targets.to_tensorrt:trt_from_checkpoint", ("onnx",), "export", proof="packed"),
    "trt-rtx": Writer("ettin.export.targets.to_tensorrt:trt_rtx_from_checkpoint", ("onnx",), "export", proof="packed"),
    # Not a target for users: an `onnx` artifact of the packed graph.
    "packed": Writer("ettin.export.targets.to_tensorrt:packed_from_checkpoint", ("onnx",), "export"),
}


def lowering(target: str) -> "Lowering":
    """The function that writes `target`, or "packed".

    Raises:
        MissingDependency: a package that it needs is not installed.
    """
    function: Lowering = WRITERS[target].imported(target)
    return function
