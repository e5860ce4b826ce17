"""Verification must catch what goes wrong elsewhere: each mistake is made on purpose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ettin.artifacts.errors import ParityError
from ettin.export import pipeline, writer
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.proof_pairs import proof_pairs
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import Weights, read_weights
from ettin.export.targets import onnx_ops, openvino_ops, to_transformers
from ettin.graph.fold import HEAD_NORM, HEAD_SCORE, inference_weights

pytestmark = pytest.mark.usefixtures("verified_here")

Mutation = Callable[[pytest.MonkeyPatch], None]


def with_weights(change: Callable[[Weights], None]) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        def read(checkpoint: Checkpoint) -> Weights:
            weights = read_weights(checkpoint)
            change(weights)
            return weights

        for module in (writer, to_transformers):
            patch.setattr(module, "read_weights", read)

    return mutate


def with_shape(**changes: Any) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        def changed(checkpoint: Checkpoint, max_length_tokens: int) -> writer.Model:
            return writer.rewrite(replace(checkpoint, shape=replace(checkpoint.shape, **changes)), max_length_tokens)

        patch.setattr(pipeline, "rewrite", changed)

    return mutate


def corrupted_head(weights: Weights) -> None:
    weights.head[f"{HEAD_SCORE}/linear.weight"][0, 17] += 0.05


def dropped_norm_bias(weights: Weights) -> None:
    weights.head[f"{HEAD_NORM}/norm.bias"].zero_()


def one_weight_off(weights: Weights) -> None:
    weights.encoder["layers.3.mlp.Wo.weight"][5].zero_()


def tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    from openvino import opset15

    patch.setattr(openvino_ops.OpenVinoOps, "gelu", lambda self, x: opset15.gelu(x, "tanh"))
    patch.setattr(onnx_ops.OnnxOps, "gelu", lambda self, x: self.node("Gelu", [x], approximate="tanh"))


def weights_stored_as_fp16(patch: pytest.MonkeyPatch) -> None:
    def rounded(*arguments: Any) -> Any:
        return {name: tensor.half().float() for name, tensor in inference_weights(*arguments).items()}

    patch.setattr(writer, "inference_weights", rounded)


MUTATIONS: dict[str, Mutation] = {
    "corrupted head weight": with_weights(corrupted_head),
    "dropped LayerNorm bias": with_weights(dropped_norm_bias),
    "one row of one MLP zeroed": with_weights(one_weight_off),
    "weights stored as fp16": weights_stored_as_fp16,
    "wrong RoPE theta": with_shape(rope_theta_local=10_000.0),
    "window of 63": with_shape(window_tokens=63),
    "epsilon of 1e-3": with_shape(norm_eps=1e-3),
    "tanh GELU": tanh_gelu,
}


@pytest.fixture(scope="module")
def proven_export(demo: Checkpoint) -> Export:
    """The reference has scored; a copy of it (`replace`) reads and rewrites the checkpoint again.

    A third of the pairs is enough to catch every mistake.
    """
    export = Export(demo, Options(max_length=256))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "proof_pairs", lambda *_, **__: proof_pairs()[::3])
        export.prepare([Job("onnx", "fp32", Path("unused"))])
    return export


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_caught(
    mutation: str, target: str, proven_export: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    MUTATIONS[mutation](monkeypatch)
    output = tmp_path / "artifact"
    with pytest.raises(ParityError, match="scores differ from the reference"):
        replace(proven_export).run(Job(target, "fp32", output))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mutation", ["corrupted head weight", "dropped LayerNorm bias"])
def test_caught_in_transformers(
    mutation: str, proven_export: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(ParityError, match="scores differ from the reference"):
        replace(proven_export).run(Job("transformers", "fp32", tmp_path / "artifact"))
    assert list(tmp_path.iterdir()) == []


def test_no_mutation_passes(proven_export: Export, tmp_path: Path) -> None:
    """The control: the same export without a mistake."""
    assert replace(proven_export).run(Job("onnx", "fp32", tmp_path / "artifact")) is not None
