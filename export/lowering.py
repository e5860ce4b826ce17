"""What a lowering takes and gives."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ettin.artifacts.manifest import Engine, Interface, Needs, TensorSpec
from ettin.export.quantise import Quantised, linear_layers
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import Weights, read_weights
from ettin.export.targets.tensorrt_builder import BuildOptions
from ettin.export.writers import lowering
from ettin.graph.fold import inference_weights


@dataclass(frozen=True)
class Lowered:
    """What a lowering wrote.

    Args:
        entry: the file that the engine opens, relative to the artifact.
        interface: its inputs and outputs.
        needs: what a machine must have.
        graph: speed choices, for the manifest.
        float_linears: int8: linear layers that stayed in floating point.
        engine: TensorRT: what it was compiled for.
    """

    entry: str
    interface: Interface
    needs: Needs
    graph: dict[str, int | bool] = field(default_factory=dict)
    float_linears: tuple[str, ...] = ()
    engine: Engine | None = None


PADDED = Interface(
    inputs=(
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens")),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "tokens")),
    ),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 1)),),
)

PACKED = Interface(
    inputs=(
        TensorSpec(name="input_ids", dtype="int64", shape=("tokens",)),
        TensorSpec(name="cu_seqlens", dtype="int64", shape=("pairs_and_one",)),
        TensorSpec(name="longest", dtype="int64", shape=("longest",)),
    ),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("pairs", 1)),),
)

RAGGED = Interface(inputs=PACKED.inputs[:2], outputs=PACKED.outputs)


@dataclass(frozen=True)
class Material:
    """What a lowering starts from.

    Args:
        checkpoint: the checked checkpoint.
        weights: its tensors.
        quantised: for int8, smoothed weights and input ranges.
        max_length: tokens that the artifact will truncate to; None: the checkpoint's.
        build: for TensorRT, what the user chose.
    """

    checkpoint: Checkpoint
    weights: Weights
    quantised: Quantised | None = None
    max_length: int | None = None
    build: BuildOptions = field(default_factory=BuildOptions)

    def folded(self) -> dict[str, NDArray[np.float32]]:
        """The inference graph's weights, float32."""
        folded = inference_weights(self.weights.encoder, self.weights.head, self.checkpoint.shape)
        return {name: tensor.numpy() for name, tensor in folded.items()}

    def float_linears(self) -> tuple[str, ...]:
        """Linear layers of the encoder that int8 leaves alone."""
        assert self.quantised is not None  # noqa: S101 (int8 only)
        return tuple(name for name in linear_layers(self.checkpoint.shape) if name not in self.quantised.input_max)


# Instruction sets that a precision needs on a CPU.
ISA: dict[str, tuple[str, ...]] = {"int8": ("vnni",)}

Lowering = Callable[[Material, str, Path], Lowered]
Quantise = Callable[[dict[str, Tensor]], Quantised]


def lower(
    checkpoint: Checkpoint,
    target: str,
    precision: str,
    folder: Path,
    quantise: Quantise | None = None,
    max_length: int | None = None,
    build: BuildOptions | None = None,
) -> Lowered:
    """Writes one target into `folder`, with the tokenizer beside it.

    Args:
        checkpoint: what is lowered.
        target: see `TARGETS`; or "packed", the graph of the TensorRT targets in fp32.
        precision: see `TARGETS`.
        folder: an empty folder.
        quantise: for int8, makes the quantised weights from the folded ones.
        max_length: see `Material`.
        build: see `Material`.
    """
    write = lowering(target)
    shutil.copyfile(checkpoint.folder / "tokenizer.json", folder / "tokenizer.json")
    weights = read_weights(checkpoint)
    material = Material(checkpoint, weights, None, max_length, build or BuildOptions())
    if quantise is not None:
        folded = inference_weights(weights.encoder, weights.head, checkpoint.shape)
        material = replace(material, quantised=quantise(folded))
        return replace(write(material, precision, folder), float_linears=material.float_linears())
    return write(material, precision, folder)
