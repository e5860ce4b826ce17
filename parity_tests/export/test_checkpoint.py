"""The checkpoint reader: what it reads, and what it refuses by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ettin.artifacts.errors import CheckpointError, DownloadError, EttinError, UnsupportedCheckpoint, UsageError
from ettin.export import reference as gold
from ettin.export.reference import load_gold
from ettin.export.source import resolve as hub
from ettin.export.source import resolve as sources
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER, SIZES
from ettin.export.source.weights import encoder_shapes, head_shapes, read_weights


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "my-fine-tune"
    shutil.copytree(DEMO_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def test_demo(demo: Checkpoint) -> None:
    assert (demo.shape.hidden_size, demo.shape.num_layers, demo.shape.window_tokens) == (128, 7, 64)
    assert demo.shape.global_layers == (True, False, False, True, False, False, True)
    assert (demo.activation, demo.max_length_tokens, demo.revision) == ("identity", 7999, None)
    weights = read_weights(demo)
    stored = sum(tensor.numel() for part in (weights.encoder, weights.head) for tensor in part.values())
    assert stored == demo.shape.num_parameters == 2_042_113


def test_a_fine_tune_is_named_by_its_folder(copy: Path) -> None:
    assert read_checkpoint(copy).name == "my-fine-tune"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_released_shapes_have_the_published_parameter_counts(size: Any) -> None:
    shape = size.shape
    assert shape.num_parameters == size.parameters
    counted = sum(
        int(torch.Size(each).numel()) for part in (encoder_shapes(shape), head_shapes(shape)) for each in part.values()
    )
    assert counted == size.parameters
    assert shape.global_layers[-1]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_released_shapes_are_those_of_the_reference_configs(
    size: Any, shared: Callable[[str], Path], copy: Path
) -> None:
    facts = json.loads(shared("configs/ettin_facts.json").read_text())["sizes"][size.name]
    assert facts["hub_revision"] == size.revision
    shutil.copyfile(shared(f"configs/config_{size.name}.json"), copy / "config.json")
    for module in ("1_Pooling", "2_Dense", "3_LayerNorm", "4_Dense"):
        edit(copy / module / "config.json", **{
            key: size.hidden_size for key in ("embedding_dimension", "in_features", "dimension")
            if key in json.loads((copy / module / "config.json").read_text())
        })  # fmt: skip
    edit(copy / "2_Dense" / "config.json", out_features=size.hidden_size)
    assert read_checkpoint(copy).shape == size.shape


def test_every_json_of_the_published_format_is_read(shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "example"
    shutil.copytree(shared("st_format/example_17m_st5.5.0_tf5.7.0"), folder)
    shutil.copyfile(shared("tokenizer/tokenizer.json"), folder / "tokenizer.json")
    for place in (folder, folder / "2_Dense", folder / "3_LayerNorm", folder / "4_Dense"):
        (place / "model.safetensors").write_bytes(b"")
    assert read_checkpoint(folder).shape == SIZES["17m"].shape


def test_sigmoid_fine_tune(copy: Path) -> None:
    edit(copy / "config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Sigmoid")
    assert read_checkpoint(copy).activation == "sigmoid"
    edit(copy / "config_sentence_transformers.json", activation_fn=...)
    assert read_checkpoint(copy).activation == "sigmoid"  # CrossEncoder's own default for one label


def test_shorter_limits_are_read(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", model_max_length=512)
    assert read_checkpoint(copy).max_length_tokens == 512
    edit(copy / "sentence_bert_config.json", max_seq_length=256)
    assert read_checkpoint(copy).max_length_tokens == 256


def test_transformers_4_config_with_both_bases_is_read_right(copy: Path) -> None:
    edit(copy / "config.json", rope_parameters=..., global_rope_theta=160000.0, local_rope_theta=160000.0)
    checkpoint = read_checkpoint(copy)
    assert checkpoint.shape.rope_theta_local == 160000.0
    load_gold(checkpoint)


MODULES = json.loads((DEMO_FOLDER / "modules.json").read_text())
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another backbone": ("config.json", {"model_type": "bert"}, "model_type is 'bert', expected 'modernbert'"),
    "another activation": ("config.json", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    "biases": ("config.json", {"attention_bias": True}, "attention_bias is True"),
    "norm biases": ("config.json", {"norm_bias": True}, "norm_bias is True"),
    "quantised": ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "layer types": ("config.json", {"layer_types": ["full_attention"] * 3}, "expected 7 of full_attention"),
    "no local theta": (
        "config.json",
        {"rope_parameters": ..., "global_rope_theta": 160000.0},
        "states no RoPE base for sliding_attention",
    ),
    "half a rope_parameters": (
        "config.json",
        {"rope_parameters": {"full_attention": {"rope_theta": 160000.0}}},
        "states no RoPE base for sliding_attention",
    ),
    "two thetas": ("config.json", {"local_rope_theta": 10000.0}, "wrong theta"),
    "scaled RoPE": ("config.json", {"rope_scaling": {"factor": 2}}, "expected rope_type 'default'"),
    "mean pooling": ("1_Pooling/config.json", {"pooling_mode": "mean"}, "pooling is 'mean', expected cls"),
    "two labels": ("4_Dense/config.json", {"out_features": 2}, "out_features is 2, expected 1"),
    "tanh head": ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, "Tanh"),
    "residual head": ("2_Dense/config.json", {"use_residual": True}, "use_residual"),
    "biased head": ("2_Dense/config.json", {"bias": True}, "bias is True, expected False"),
    "prompts": ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "prompts are not applied"),
    "unknown activation": ("config_sentence_transformers.json", {"activation_fn": "my.Fn"}, "Identity or Sigmoid"),
    "vocabulary": ("config.json", {"vocab_size": 100}, "the vocabulary is 8192, expected at most 100"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(copy: Path, case: str) -> None:
    file, changes, message = REFUSED[case]
    edit(copy / file, **changes)
    with pytest.raises(UnsupportedCheckpoint) as error:
        read_checkpoint(copy)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("drop", "left"), [(3, "Transformer, Pooling, Dense, Dense"), (4, "Transformer, Pooling, Dense, LayerNorm")]
)
def test_missing_head_module(copy: Path, drop: int, left: str) -> None:
    (copy / "modules.json").write_text(json.dumps(MODULES[:drop] + MODULES[drop + 1 :]))
    with pytest.raises(UnsupportedCheckpoint, match=f"list of modules is '{left}', expected Transformer"):
        read_checkpoint(copy)


def test_plain_encoder_has_no_head(copy: Path) -> None:
    (copy / "modules.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"no modules.json \(architectures: \['ModernBertModel'\]\)"):
        read_checkpoint(copy)


def test_pickled_weights(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match="pickled weights can run code"):
        read_checkpoint(copy)


WHOLE = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "2_Dense/model.safetensors",
    "4_Dense/config.json",
)  # fmt: skip


@pytest.mark.parametrize("missing", WHOLE)
def test_missing_file(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(CheckpointError, match="whole"):
        read_checkpoint(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "4_Dense/model.safetensors"])
def test_truncated_weights(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged or truncated weights") as error:
        read_weights(read_checkpoint(copy))
    assert "\n" not in str(error.value)


def test_wrong_tensors(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    wrong = {name: tensor for name, tensor in tensors.items() if name != "layers.2.mlp.Wo.weight"}
    save_file(wrong, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'layers.2.mlp.Wo.weight' is missing"):
        read_weights(read_checkpoint(copy))
    save_file({**tensors, "pooler.weight": torch.ones(2)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'pooler.weight' is unknown"):
        read_weights(read_checkpoint(copy))
    save_file({**tensors, "final_norm.weight": torch.ones(64)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'final_norm.weight' is \(64,\), config.json says \(128,\)"):
        read_weights(read_checkpoint(copy))


def test_sharded_weights_are_joined(copy: Path, demo: Checkpoint) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:20]}, copy / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[20:]}, copy / "model-00002-of-00002.safetensors")
    (copy / "model.safetensors").unlink()
    assert read_weights(read_checkpoint(copy)).encoder.keys() == read_weights(demo).encoder.keys()


def test_old_transformers_is_refused(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gold.transformers, "__version__", "4.57.3")
    with pytest.raises(EttinError, match=r"transformers 4.57.3 reads Ettin configs with a wrong RoPE base"):
        load_gold(demo)


def test_theta_that_transformers_reads_otherwise_is_refused(demo: Checkpoint) -> None:
    from dataclasses import replace

    stated = replace(demo, shape=replace(demo.shape, rope_theta_local=20_000.0))
    with pytest.raises(UnsupportedCheckpoint, match="wrong theta"):
        load_gold(stated)


def test_sources_that_contradict(tmp_path: Path) -> None:
    for arguments, message in (
        ({}, "name one checkpoint"),
        ({"size": "17m", "checkpoint": "x/y"}, "name one checkpoint"),
        ({"size": "17m", "revision": "main"}, "--revision goes with --checkpoint"),
        ({"size": "demo", "random_weights": True}, "--random-weights goes with --size 17m|32m"),
        ({"checkpoint": "x/y", "random_weights": True}, "--random-weights goes with"),
        ({"size": "demo", "tokenizer": tmp_path}, "--tokenizer goes with --random-weights"),
        ({"checkpoint": str(tmp_path), "revision": "main"}, "is a folder"),
        ({"size": "70m"}, "unknown size '70m', expected one of: demo, 17m, 32m, 68m, 150m, 400m, 1b"),
    ):
        with pytest.raises(UsageError) as error, sources.opened(**arguments):
            pass
        assert message in str(error.value)
    with (
        pytest.raises(CheckpointError, match="no such folder, and not a hub id"),
        sources.opened(checkpoint="./no/such/dir"),
    ):
        pass


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    response = SimpleNamespace(request=None, headers={}, status_code=403)
    kind = getattr(errors, name)
    made: Exception = kind("refused", response=response) if issubclass(kind, errors.HfHubHTTPError) else kind("refused")
    return made


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "accept its terms first"),
        ("RepositoryNotFoundError", "no such repository on the hub"),
        ("RevisionNotFoundError", "has no such revision"),
        ("LocalEntryNotFoundError", "--checkpoint DIR"),
        ("HfHubHTTPError", "--checkpoint DIR"),
        ("OfflineModeIsEnabled", "--checkpoint DIR"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError) as error:
        hub.download(SIZES["17m"].hub_id, SIZES["17m"].revision)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sizes_are_downloaded_at_their_pinned_revision(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    """The real loading code over a stand-in for the hub: a folder named by its commit."""
    import huggingface_hub

    asked: dict[str, Any] = {}
    snapshot = copy.rename(copy.with_name(SIZES["17m"].revision))

    def deliver(hub_id: str, **arguments: Any) -> str:
        asked.update(arguments, hub_id=hub_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    with sources.opened(size="17m") as checkpoint:
        assert (checkpoint.id, checkpoint.revision) == (SIZES["17m"].hub_id, SIZES["17m"].revision)
        assert checkpoint.name == "ettin-reranker-17m-v1"
    assert asked["revision"] == SIZES["17m"].revision
    assert not any("bin" in pattern or "*.py" in pattern for pattern in asked["allow_patterns"])


def test_random_weights_are_seeded_and_said(tmp_path: Path) -> None:
    with sources.opened(size="17m", random_weights=True, seed=5) as first:
        assert first.is_random and first.name == "ettin-reranker-17m-v1-random"
        assert first.shape.hidden_size == 256 and first.shape.vocab_size == 50368
        checksum = first.weights_sha256()
        folder = first.folder
    assert not folder.exists()
    with sources.opened(size="17m", random_weights=True, seed=5) as again:
        assert again.weights_sha256() == checksum
    with sources.opened(size="17m", random_weights=True, seed=6) as other:
        assert other.weights_sha256() != checksum
