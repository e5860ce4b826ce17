"""Lowering: what a writer starts from, what it gives, and what all writers share."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ettin.artifacts.errors import HardwareError, MissingDependency
from ettin.artifacts.manifest import Engine, Interface, Needs, TensorSpec
from ettin.artifacts.targets import Target, target_named
from ettin.export.options import BuildOptions, Options
from ettin.export.quantise import Quantised
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import read_weights
from ettin.graph.fold import inference_weights

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

# Instruction sets that a precision needs on a CPU.
ISA: dict[str, tuple[str, ...]] = {"int8": ("vnni",)}


@dataclass(frozen=True)
class Model:
    """The inference graph of a checkpoint: what is lowered.

    Args:
        checkpoint: the checked checkpoint.
        weights: what `fold.inference_weights` returns, float32.
        max_length_tokens: tokens that artifacts truncate to.
        quantised: for int8: smoothed weights and input ranges.
    """

    checkpoint: Checkpoint
    weights: dict[str, Tensor]
    max_length_tokens: int
    quantised: Quantised | None = None

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The weights as arrays that share their memory."""
        return {name: tensor.numpy() for name, tensor in self.weights.items()}


def rewrite(checkpoint: Checkpoint, max_length_tokens: int | None = None) -> Model:
    """Reads a checkpoint's tensors and rewrites the model as a cheaper, equivalent graph.

    Args:
        checkpoint: the checked checkpoint.
        max_length_tokens: tokens that artifacts truncate to; None: the checkpoint's.

    Raises:
        CheckpointError: its tensors are not those that its config describes.
    """
    weights = read_weights(checkpoint)
    folded = inference_weights(weights.encoder, weights.head, checkpoint.shape)
    return Model(checkpoint, folded, max_length_tokens or checkpoint.max_length_tokens)


@dataclass(frozen=True)
class Lowered:
    """What a writer wrote.

    Args:
        entry: the file that the engine opens, relative to the artifact.
        interface: its inputs and outputs.
        needs: what a machine must have.
        graph: speed choices, for the manifest.
        engine: TensorRT: what it was compiled for.
        notes: what the user should know about what was written.
    """

    entry: str
    interface: Interface
    needs: Needs
    graph: dict[str, int | bool] = field(default_factory=dict)
    engine: Engine | None = None
    notes: tuple[str, ...] = ()


class Writer(ABC):
    """Writes the artifacts of one target. A subclass implements `write` and overrides what differs from the defaults.

    Args:
        target: the target.
        build: see `BuildOptions`.
    """

    def __init__(self, target: Target, build: BuildOptions | None = None) -> None:
        self.target, self.build = target, build or BuildOptions()

    @abstractmethod
    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        """Writes the engine's files into `folder`, an existing folder with `tokenizer.json` in it.

        Args:
            model: what is lowered.
            precision: one of the target's; "fp32" also proves the graph of the others.
            folder: where to.
        """

    def lower(self, model: Model, precision: str, folder: Path) -> Lowered:
        """Writes everything that the engine and its tokenizer need into `folder`, which is empty."""
        shutil.copyfile(model.checkpoint.folder / "tokenizer.json", folder / "tokenizer.json")
        return self.write(model, precision, folder)

    def proof(self, precision: str) -> "Writer":
        """Writes the fp32 artifact that proves the graph of a reduced precision."""
        return self

    def environments(self, precision: str) -> Iterable[Mapping[str, str]]:
        """Environment variables under which this machine computes as others will; each is verified, too."""
        return ()

    def check(self) -> None:  # noqa: B027 (most writers refuse nothing)
        """Refuses what can't be written, before any work.

        Raises:
            EttinError: says what and why.
        """

    def check_runs_here(self, precision: str) -> None:
        """Refuses a machine that can't run what is written.

        Raises:
            MissingDependency: the engine is not installed.
            HardwareError: this machine lacks the device.
        """
        self.target.runtime_class()


def check_machine(target_name: str, precision: str, options: Options) -> None:
    """Refuses an artifact that can't be made here, before anything is read or downloaded.

    Raises:
        EttinError: a missing package or device, or options of another target.
    """
    writer = writer_for(target_name, options)
    writer.check()
    can_be_proven(writer, precision, options)


def can_be_proven(writer: Writer, precision: str, options: Options) -> bool:
    """Whether the artifact can be run here; False only where it may be published unproven.

    Raises:
        EttinError: what keeps it from being run, and so from being proven.
    """
    if writer.build.kit:
        return False  # a kit is proven when its engine is built
    try:
        writer.check_runs_here(precision)
    except (MissingDependency, HardwareError) as error:
        if options.allow_unverified:
            return False
        if isinstance(error, MissingDependency):
            raise
        raise HardwareError(
            f"{error}; so its scores can't be proven here. Publish it unproven: --allow-unverified, then where it "
            "runs: ettin-verify"
        ) from None
    return True


def writer_for(target_name: str, options: Options) -> Writer:
    """The writer of a target; raises `MissingDependency`."""
    target = target_named(target_name)
    build = options.build if target.is_compiled else None
    writer: Writer = target.writer.load(f"target '{target_name}'")(target, build)
    return writer
