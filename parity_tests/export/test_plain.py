"""Plain checkpoints, `ModernBertForSequenceClassification`: what is read, what is refused, and their exports."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from support import PLAIN
from transformers import AutoConfig

from ettin.artifacts import tolerances
from ettin.artifacts.errors import CheckpointError, UnsupportedCheckpoint
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.parity import read_parity
from ettin.export import pipeline
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.proof_pairs import natural_pairs
from ettin.export.quantise import LADDER, Quantiser
from ettin.export.reference import load_gold
from ettin.export.source.checkpoint import IDENTITY, Checkpoint, read_checkpoint
from ettin.export.source.weights import read_weights
from ettin.export.targets.to_openvino import OpenVinoWriter
from ettin.export.writer import rewrite
from ettin.graph.torch_ops import InferenceGraph
from ettin.runtimes import load
from ettin.runtimes.engines.openvino_kernels import SWITCH
from ettin.runtimes.verify import Verification

ReadPlain = Callable[[str], Checkpoint]
PAIRS = [
    ("which planet is red", "Mars is the red planet."),
    ("which planet is red", "Venus is Earth's twin. " * 20),
    ("which planet is red", "Jupiter " * 500),
    ("", ""),
]


@pytest.fixture
def copy(plain: ReadPlain, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain("biased cls").folder, tmp_path / "my-reranker"))


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


# Reading.


@pytest.mark.parametrize("kind", PLAIN)
def test_read(plain: ReadPlain, kind: str) -> None:
    checkpoint, settings = plain(kind), PLAIN[kind]
    shape, weights = checkpoint.shape, read_weights(checkpoint)
    assert checkpoint.is_plain and checkpoint.max_length_tokens == 3000
    assert shape.pooling == settings.get("classifier_pooling", "cls")
    assert [f"{bias}_bias" for bias in shape.biases] == [key for key in settings if key.endswith("_bias")]
    assert (shape.rope_theta_global, shape.rope_theta_local) == settings.get("bases", (160_000.0, 10_000.0))
    assert shape.norm_eps == shape.head_norm_eps == settings.get("norm_eps", 1e-5)
    stored = sum(tensor.numel() for part in (weights.encoder, weights.head) for tensor in part.values())
    assert shape.num_parameters - stored == (0 if "norm" in shape.biases else shape.hidden_size)
    load_gold(checkpoint)


@pytest.mark.parametrize("kind", [kind for kind, settings in PLAIN.items() if settings.get("generation") == 4])
def test_config_of_transformers_4_reads_as_that_of_5(plain: ReadPlain, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(plain(kind).folder, folder)
    assert "rope_parameters" not in json.loads((folder / "config.json").read_text())
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    assert "local_rope_theta" not in json.loads((folder / "config.json").read_text())
    assert read_checkpoint(folder).shape == plain(kind).shape


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, "identity"),
        ({"sbert_ce_default_activation_function": IDENTITY}, "identity"),
    ],
)
def test_activation_is_that_of_cross_encoder(copy: Path, changes: dict[str, Any], activation: str) -> None:
    edit(copy / "config.json", **changes)
    checkpoint = read_checkpoint(copy)
    assert checkpoint.activation == activation
    load_gold(checkpoint)
    with pytest.raises(UnsupportedCheckpoint, match=f"CrossEncoder applies {activation}"):
        load_gold(replace(checkpoint, activation="sigmoid" if activation == "identity" else "identity"))


def test_what_sentence_transformers_saves(copy: Path, tmp_path: Path) -> None:
    """Its folders have modules.json and a limit and an activation of their own."""
    folder = tmp_path / "saved"
    model = CrossEncoder(str(copy), device="cpu", activation_fn=torch.nn.Identity(), max_length=700)
    model.save_pretrained(str(folder))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.is_plain and checkpoint.shape == read_checkpoint(copy).shape
    assert (checkpoint.activation, checkpoint.max_length_tokens) == ("identity", 700)
    load_gold(checkpoint)
    edit(folder / "config.json", architectures=["ModernBertModel"])
    with pytest.raises(UnsupportedCheckpoint, match="list of modules is 'Transformer', expected Transformer, Pooling"):
        read_checkpoint(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another backbone": ({"model_type": "bert"}, "model_type is 'bert', expected 'modernbert'"),
    "another class": ({"architectures": ["BertForSequenceClassification"]}, "['BertForSequenceClassification']"),
    "two labels": ({"id2label": {"0": "no", "1": "yes"}}, "the number of labels is 2, expected 1"),
    "labels unsaid": ({"id2label": ...}, "the number of labels is 2, expected 1"),
    "pooling": ({"classifier_pooling": "max"}, "classifier_pooling is 'max', expected 'cls' or 'mean'"),
    "head activation": ({"classifier_activation": "relu"}, "classifier_activation is 'relu', expected 'gelu'"),
    "activation": ({"hidden_activation": "gelu_new"}, "hidden_activation is 'gelu_new', expected 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "scaled RoPE": ({"rope_scaling": {"factor": 2}}, "expected rope_type 'default'"),
    "no base": ({"local_rope_theta": ...}, "states no RoPE base for sliding_attention"),
    # An Ettin config of transformers 5 that version 4 has loaded and saved.
    "two bases": (
        {"local_rope_theta": 10_000.0, "rope_parameters": {"sliding_attention": {"rope_theta": 160_000.0}}},
        "states two RoPE bases for sliding_attention, [10000.0, 160000.0]",
    ),
    "score activation": ({"sentence_transformers": {"activation_fn": "my.Fn"}}, "Identity or Sigmoid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(copy: Path, case: str) -> None:
    changes, message = REFUSED[case]
    edit(copy / "config.json", **changes)
    with pytest.raises(UnsupportedCheckpoint) as error:
        read_checkpoint(copy)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": "4"}, {"global_attn_every_n_layers": 0}, {"rope_parameters": [1]}]
)
def test_values_of_another_type(copy: Path, changes: dict[str, Any]) -> None:
    edit(copy / "config.json", **changes)
    with pytest.raises(CheckpointError, match="has a value that ModernBERT can't have"):
        read_checkpoint(copy)


def test_biases_must_be_those_of_the_config(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.layers.0.attn.Wqkv.bias", "model.layers.3.mlp_norm.bias", "head.norm.bias", "classifier.bias"):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
        with pytest.raises(CheckpointError, match="is missing"):
            read_weights(read_checkpoint(copy))
    save_file({**tensors, "pooler.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"'pooler.weight' is unknown"):
        read_weights(read_checkpoint(copy))
    save_file(tensors, path)
    edit(copy / "config.json", mlp_bias=False)
    with pytest.raises(CheckpointError, match=r"'layers.0.mlp.Wi.bias' is unknown"):
        read_weights(read_checkpoint(copy))


# Exporting.


@pytest.mark.parametrize("kind", ["biased cls", "biased mean"])
def test_smoothing_and_balancing_change_no_score(plain: ReadPlain, kind: str) -> None:
    checkpoint = plain(kind)
    shape, weights = checkpoint.shape, rewrite(checkpoint).weights
    generator = np.random.default_rng(0)
    quantiser = Quantiser(weights, shape, [generator.integers(0, 8000, 60).astype(np.int32) for _ in range(4)])
    quantised = quantiser.quantised(LADDER[0])
    assert len(quantised.attention_max) == (3 if shape.pooling == "cls" else 4)
    for name in ("layers.1.v.bias", "layers.1.gate.bias", "layers.1.q.bias", "layers.1.k.bias"):
        assert not torch.allclose(quantised.weights[name], weights[name])
    ids = torch.randint(0, 8187, (3, 90), generator=torch.Generator().manual_seed(0))
    before, after = (InferenceGraph(w, shape)(ids, torch.ones_like(ids)) for w in (weights, quantised.weights))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def exported(checkpoint: Checkpoint, folder: Path, *variants: tuple[str, str]) -> dict[tuple[str, str], Path]:
    """Artifacts that have passed the gate."""
    jobs = [Job(target, precision, folder / f"{target}-{precision}") for target, precision in variants]
    for job, result in Export(checkpoint, Options(command="ettin-export")).run_all(jobs):
        assert isinstance(result, Verification), (job, result)
    return {(job.target, job.precision): job.output for job in jobs}


@pytest.mark.parametrize("kind", ["cls", "biased mean"])
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_exports_score_as_cross_encoder(
    plain: ReadPlain, tmp_path: Path, kind: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both graphs of `openvino` are verified. The other arithmetics of int8 are not: the only rule for random weights is
    # that scores are finite. `demo_artifacts` has them all.
    monkeypatch.setattr(OpenVinoWriter, "environments", lambda self, precision: [{SWITCH: "off"}])
    checkpoint = plain(kind)
    artifacts = exported(checkpoint, tmp_path, (target, "fp32"), (target, "int8"))
    model = load_gold(checkpoint)
    probabilities, logits = (model.predict(PAIRS, activation_fn=fn) for fn in (None, torch.nn.Identity()))
    assert np.ptp(logits) > 0.5
    with load(artifacts[target, "fp32"]) as reranker:
        np.testing.assert_allclose(reranker.predict(PAIRS), probabilities, atol=1e-5)
        np.testing.assert_allclose(reranker.predict(PAIRS, activation_fn="identity"), logits, atol=1e-4)
    manifest = Manifest.read(artifacts[target, "int8"])
    assert manifest.activation == "sigmoid" and manifest.source.shape["pooling"] == checkpoint.shape.pooling
    assert manifest.parity.spearman is not None and manifest.parity.spearman > 0.98


@pytest.mark.usefixtures("verified_here")
def test_transformers_target_keeps_a_plain_checkpoint(plain: ReadPlain, tmp_path: Path) -> None:
    source = plain("biased mean").folder
    artifact = exported(plain("biased mean"), tmp_path, ("transformers", "fp32"))["transformers", "fp32"]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, artifact))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, artifact))
    assert old.items() <= new.items()
    assert read_checkpoint(artifact).shape == plain("biased mean").shape


@pytest.mark.usefixtures("verified_here")
def test_a_trained_checkpoint_written_as_a_plain_one(
    demo_artifacts: dict[tuple[str, str], Path], demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights in both formats give the same artifacts."""
    # Scores are compared with those of an artifact that has passed on many pairs.
    monkeypatch.setattr(pipeline, "proof_pairs", lambda extra, ranking: natural_pairs(ranking)[:240])
    plain = read_checkpoint(demo_artifacts["transformers", "fp32"])
    assert plain.is_plain and plain.activation == demo.activation and plain.shape == demo.shape
    artifacts = exported(plain, tmp_path, ("onnx", "fp32"), ("onnx", "int8"))
    for precision, limit in (("fp32", tolerances.FP32), ("int8", 1e-2)):
        cases = read_parity(demo_artifacts["onnx", precision])
        pairs = [(case.query, case.document) for case in cases[::3] if len(case.ids) < 600]
        with load(artifacts["onnx", precision]) as ours, load(demo_artifacts["onnx", precision]) as modular:
            np.testing.assert_allclose(ours.predict(pairs), modular.predict(pairs), atol=limit, rtol=limit)
