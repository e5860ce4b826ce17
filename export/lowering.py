"""What a lowering takes and gives."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ettin.artifacts.manifest import Interface, Needs, TensorSpec
from ettin.export.checkpoint import Checkpoint
from ettin.export.weights import Weights, read_weights
from ettin.export.writers import lowering


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


def lower(checkpoint: Checkpoint, target: str, precision: str, folder: Path) -> Lowered:
    """Writes one target into `folder`, with the tokenizer beside it."""
    write = lowering(target)
    shutil.copyfile(checkpoint.folder / "tokenizer.json", folder / "tokenizer.json")
    return write(checkpoint, read_weights(checkpoint), precision, folder)
