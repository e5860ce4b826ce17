"""A whole target outside of the package: its description, its writer and its runtime."""

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ettin.artifacts import OpenArtifact
from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.manifest import Needs
from ettin.artifacts.targets import Component, Target
from ettin.export.writer import PADDED, Lowered, Model, Writer
from ettin.graph import ModelShape
from ettin.graph.torch_ops import InferenceGraph
from ettin.runtimes import Batch, Runtime
from ettin.runtimes.base import Settings
from ettin.runtimes.batch import BatchLimits

TOY = Target(
    name="toy",
    precisions=("fp32",),
    runs_on="torch, from NumPy's own file format",
    runtime=Component("toy_target:ToyRuntime", ("torch",), distribution="toy-target"),
    writer=Component("toy_target:ToyWriter", distribution="toy-target"),
)

TOY_ON_ABACUS = Component(
    "toy_target:ToyRuntime", ("torch",), distribution="toy-target", experimental="not yet run with beads"
)


class ToyWriter(Writer):
    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        np.savez(folder / "model.npz", **model.arrays())
        needs = Needs(device="cpu", isa=(), package="torch", version=torch.__version__)
        return Lowered(entry="model.npz", interface=PADDED, needs=needs)


class ToyRuntime(Runtime):
    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        weights = np.load(io.BytesIO(artifact.read(artifact.manifest.entry)), allow_pickle=False)
        shape = ModelShape.from_json(artifact.manifest.source.shape)
        self._graph = InferenceGraph({name: torch.from_numpy(weights[name]) for name in weights.files}, shape)
        super().__init__(artifact, settings, BatchLimits(concurrency=1, batch_tokens=4096))

    @property
    def description(self) -> str:
        return f"torch {torch.__version__} from a toy file"

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic.F32

    def score(self, batch: Batch) -> NDArray[np.float32]:
        input_ids, attention_mask = (torch.from_numpy(array) for array in batch.padded())
        return np.asarray(self._graph(input_ids, attention_mask)[:, 0].numpy())
