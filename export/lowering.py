"""What a lowering is, and which one writes which target."""

import importlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ettin.artifacts.errors import MissingDependency
from ettin.artifacts.manifest import Interface, Needs, TensorSpec
from ettin.export.checkpoint import Checkpoint
from ettin.export.weights import Weights, read_weights


@dataclass(frozen=True)
class Lowered:
    """What a lowering wrote.

    Args:
        entry: the file that the engine opens, relative to the artifact.
        interface: its inputs and outputs.
        needs: what a machine must have.
        graph: speed choices, for the manifest.
    """

    entry: str
    interface: Interface
    needs: Needs
    graph: dict[str, int | bool] = field(default_factory=dict)


PADDED = Interface(
    inputs=(
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens")),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "tokens")),
    ),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 1)),),
)

Lowering = Callable[[Checkpoint, Weights, str, Path], Lowered]


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
        "ettin.export.to_openvino:openvino_from_checkpoint", ("openvino",), "openvino", {"bf16": _WITHOUT_BF16}
    ),
    "transformers": Writer(
        "ettin.export.to_transformers:transformers_from_checkpoint", ("safetensors", "transformers"), "export"
    ),
}


def lowering(target: str) -> Lowering:
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


def lower(checkpoint: Checkpoint, target: str, precision: str, folder: Path) -> Lowered:
    """Writes one target into `folder`, with the tokenizer beside it."""
    write = lowering(target)
    shutil.copyfile(checkpoint.folder / "tokenizer.json", folder / "tokenizer.json")
    return write(checkpoint, read_weights(checkpoint), precision, folder)
