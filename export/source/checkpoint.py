"""Reads the configs of a modular CrossEncoder checkpoint, and refuses by name what is not an Ettin reranker."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ettin.artifacts.errors import CheckpointError, UnsupportedCheckpoint
from ettin.artifacts.files import file_sha256
from ettin.artifacts.names import checked_file_name
from ettin.graph import ModelShape
from ettin.runtimes.tokenizer import PairTokenizer

_KINDS = (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta"))


def rope_thetas(path: Path, config: dict[str, Any]) -> tuple[float, float]:
    """Bases of the global and the local layers.

    transformers 5 writes `rope_parameters`, transformers 4 `global_rope_theta` and `local_rope_theta`; each reads
    the other's config with ModernBERT's defaults (local 10000, where Ettin has 160000) without a word.

    Args:
        path: of the config, for messages.
        config: its content.

    Raises:
        UnsupportedCheckpoint: a base is not stated, stated twice with different values, or not plain RoPE.
    """
    found = []
    for kind, old_key in _KINDS:
        parameters = (config.get("rope_parameters") or {}).get(kind) or {}
        if parameters.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise UnsupportedCheckpoint(f"{path}: scaled RoPE {parameters}, expected rope_type 'default'")
        stated = {value for value in (parameters.get("rope_theta"), config.get(old_key)) if value is not None}
        if not stated:
            raise UnsupportedCheckpoint(
                f"{path}: states no RoPE base for {kind} (neither rope_parameters nor {old_key}), and the default of "
                "ModernBERT is wrong for Ettin. Save the checkpoint again with transformers 5"
            )
        if len(stated) > 1:
            raise UnsupportedCheckpoint(
                f"{path}: states two RoPE bases for {kind}, {sorted(stated)}: a transformers-4 config read with the "
                "wrong theta. Save the checkpoint again with transformers 5"
            )
        found.append(float(stated.pop()))
    return found[0], found[1]


def check_read_by_transformers(path: Path, config: Any, thetas: tuple[float, float]) -> None:
    """Refuses when the installed transformers read other bases than the config states.

    Raises:
        UnsupportedCheckpoint: it did.
    """
    read = tuple(float(config.rope_parameters[kind]["rope_theta"]) for kind, _ in _KINDS)
    if read != thetas:
        raise UnsupportedCheckpoint(
            f"{path}: states RoPE bases {thetas}, transformers reads {read}: a transformers-4 config read with the "
            "wrong theta. Save the checkpoint again with transformers 5"
        )


ENCODER = "encoder"
_MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dense")
_ACTIVATIONS: dict[str | None, Literal["identity", "sigmoid"]] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    None: "sigmoid",  # what CrossEncoder applies to one label when the checkpoint does not say
}


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint; its weights are read later.

    Args:
        folder: where it is.
        id: hub id, or the folder's name.
        revision: hub commit; None for a folder.
        is_random: made by `--random-weights`.
        shape: read from its configs.
        head_folders: folders of the three head modules, in order.
        activation: what CrossEncoder applies to the logit.
        max_length_tokens: what CrossEncoder truncates to.
    """

    folder: Path
    id: str
    revision: str | None
    is_random: bool
    shape: ModelShape
    head_folders: tuple[str, str, str]
    activation: Literal["identity", "sigmoid"]
    max_length_tokens: int

    @property
    def name(self) -> str:
        """Folder name of its artifacts."""
        return self.id.split("/")[-1] + ("-random" if self.is_random else "")

    def weight_files(self) -> list[Path]:
        """All files with weights, in order of their names."""
        encoder = sorted(self.folder.glob("model*.safetensors"))
        return encoder + [self.folder / each / "model.safetensors" for each in self.head_folders]

    def weights_sha256(self) -> str:
        """Checksum over the names and checksums of all weight files."""
        digest = hashlib.sha256()
        for path in self.weight_files():
            digest.update(f"{path.relative_to(self.folder).as_posix()} {file_sha256(path)}\n".encode())
        return digest.hexdigest()


def read_checkpoint(
    folder: Path,
    *,
    id: str | None = None,  # noqa: A002
    revision: str | None = None,
    is_random: bool = False,
) -> Checkpoint:
    """Reads and checks every config of a checkpoint.

    Args:
        folder: the checkpoint in the modular format of sentence-transformers 5.
        id: its hub id; None: the folder's name.
        revision: its hub commit.
        is_random: made by `--random-weights`.

    Raises:
        CheckpointError: a file is missing or unreadable.
        UnsupportedCheckpoint: not this architecture; says what was found and what was expected.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    head_folders = _head_folders(folder)
    config = _json(folder / "config.json")
    shape = _shape(folder, config)
    _check_head(folder, head_folders, shape.hidden_size)
    _check_weight_files(folder, head_folders)
    settings = _json(folder / "config_sentence_transformers.json")
    if settings.get("default_prompt_name") is not None:
        _refuse(folder, "default_prompt_name", settings["default_prompt_name"], "none (prompts are not applied)")
    activation = settings.get("activation_fn")
    if activation not in _ACTIVATIONS:
        _refuse(folder, "activation_fn", activation, "Identity or Sigmoid")
    checkpoint = Checkpoint(
        folder=folder,
        id=id or folder.resolve().name,
        revision=revision,
        is_random=is_random,
        shape=shape,
        head_folders=head_folders,
        activation=_ACTIVATIONS[activation],
        max_length_tokens=_max_length(folder, shape),
    )
    try:
        checked_file_name(checkpoint.name)
    except ValueError as error:
        raise CheckpointError(f"{folder}: artifacts would be named after it, but the name {error}. Rename it") from None
    return checkpoint


def _refuse(where: Path, what: str, found: object, expected: str) -> None:
    raise UnsupportedCheckpoint(f"{where}: {what} is {found!r}, expected {expected}: not an Ettin reranker")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so this is not a whole checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _head_folders(folder: Path) -> tuple[str, str, str]:
    path = folder / "modules.json"
    if not path.is_file():
        config = folder / "config.json"
        architecture = _json(config).get("architectures") if config.is_file() else None
        raise UnsupportedCheckpoint(
            f"{folder}: no modules.json (architectures: {architecture}), expected a modular CrossEncoder checkpoint"
        )
    try:
        modules = [(str(each["type"]).split(".")[-1], str(each["path"])) for each in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path}: not a list of modules") from None
    kinds = tuple(kind for kind, _ in modules)
    if kinds != _MODULES:
        _refuse(path, "the list of modules", ", ".join(kinds), ", ".join(_MODULES))
    if modules[0][1]:
        _refuse(path, "the encoder's folder", modules[0][1], "the checkpoint's own folder")
    dense, norm, score = (at for _, at in modules[2:])
    pooling = _json(folder / modules[1][1] / "config.json")
    mode = pooling.get("pooling_mode") or [
        key.removeprefix("pooling_mode_") for key, value in pooling.items() if key.startswith("pooling_mode_") and value
    ]
    if mode not in ("cls", ["cls"], ["cls_token"]):
        _refuse(folder / modules[1][1], "pooling", mode, "cls")
    return dense, norm, score


def _shape(folder: Path, config: dict[str, Any]) -> ModelShape:
    path = folder / "config.json"
    expected: dict[str, Any] = {
        "model_type": "modernbert", "hidden_activation": "gelu", "attention_bias": False, "mlp_bias": False,
        "norm_bias": False,
    }  # fmt: skip
    for key, value in expected.items():
        if config.get(key, value if key != "model_type" else None) != value:
            _refuse(path, key, config.get(key), repr(value))
    if config.get("quantization_config"):
        _refuse(path, "quantization_config", config["quantization_config"], "none")
    try:
        layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
        every = config.get("global_attn_every_n_layers", 3)
        kinds = config.get("layer_types") or [
            "sliding_attention" if layer % every else "full_attention" for layer in range(layers)
        ]
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            _refuse(path, "layer_types", kinds, f"{layers} of full_attention, sliding_attention")
        if hidden % heads or (hidden // heads) % 2:
            _refuse(path, "hidden_size / num_attention_heads", f"{hidden} / {heads}", "an even head dimension")
        theta_global, theta_local = rope_thetas(path, config)
        return ModelShape(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            global_layers=tuple(kind == "full_attention" for kind in kinds),
            window_tokens=config["local_attention"] // 2,
            rope_theta_global=theta_global,
            rope_theta_local=theta_local,
            norm_eps=config["norm_eps"],
            head_norm_eps=1e-5,
            max_tokens=config["max_position_embeddings"],
            pad_token_id=config["pad_token_id"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}") from None


def _check_head(folder: Path, head: tuple[str, str, str], hidden: int) -> None:
    dense, norm, score = (_json(folder / each / "config.json") for each in head)
    wanted = (
        (head[0], dense, "in_features", hidden), (head[0], dense, "out_features", hidden),
        (head[0], dense, "bias", False),
        (head[0], dense, "activation_function", "torch.nn.modules.activation.GELU"),
        (head[1], norm, "dimension", hidden),
        (head[2], score, "in_features", hidden), (head[2], score, "out_features", 1), (head[2], score, "bias", True),
        (head[2], score, "activation_function", "torch.nn.modules.linear.Identity"),
        (head[2], score, "module_output_name", "scores"),
    )  # fmt: skip
    for name, config, key, value in wanted:
        if config.get(key) != value:
            _refuse(folder / name, key, config.get(key), repr(value))
        if config.get("use_residual"):
            _refuse(folder / name, "use_residual", True, "False")


def _check_weight_files(folder: Path, head: tuple[str, str, str]) -> None:
    for place in (folder, *(folder / each for each in head)):
        if any(place.glob("model*.safetensors")):
            continue
        pickled = next((each.name for each in place.glob("pytorch_model*.bin")), None)
        if pickled:
            raise UnsupportedCheckpoint(
                f"{place / pickled}: pickled weights can run code when they are read, so they are refused. "
                "Save them as safetensors: CrossEncoder(…).save_pretrained(DIR)"
            )
        raise CheckpointError(f"{place}: no model.safetensors, so the checkpoint is not whole")


def _max_length(folder: Path, shape: ModelShape) -> int:
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: missing, so this is not a whole checkpoint")
    vocabulary = PairTokenizer(tokenizer).vocab_size
    if vocabulary > shape.vocab_size:
        _refuse(tokenizer, "the vocabulary", vocabulary, f"at most {shape.vocab_size} (vocab_size of the encoder)")
    limits = [
        shape.max_tokens,
        _json(folder / "tokenizer_config.json").get("model_max_length"),
        _json(folder / "sentence_bert_config.json").get("max_seq_length"),
    ]
    return int(min(limit for limit in limits if limit is not None))
