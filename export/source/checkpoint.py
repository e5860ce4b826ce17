"""Reads the configs of a checkpoint, and refuses by name what is not a ModernBERT reranker that can be exported.

A modular checkpoint is an Ettin reranker: `modules.json` lists an encoder and the modules of the head. A plain one is a
`ModernBertForSequenceClassification` with one label.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from ettin.artifacts.errors import CheckpointError, UnsupportedCheckpoint
from ettin.artifacts.files import file_sha256
from ettin.artifacts.names import checked_file_name
from ettin.graph import ModelShape
from ettin.runtimes.tokenizer import PairTokenizer

ROPE_BASES = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}  # layer type: old key
WRONG_BASE = "a transformers-4 config read with the wrong theta. Save the checkpoint again with transformers 5"

CLASS = "ModernBertForSequenceClassification"
IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"
_HIDDEN = "the encoder's hidden_size"
# What modules.json lists, and what the config of each module says. Pooling has two forms, see `_check_pooling`.
_MODULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Transformer", {
        "model_type": "modernbert", "hidden_activation": "gelu", "attention_bias": False, "mlp_bias": False,
        "norm_bias": False, "quantization_config": None,
    }),
    ("Pooling", {}),
    ("Dense", {
        "in_features": _HIDDEN, "out_features": _HIDDEN, "bias": False,
        "activation_function": "torch.nn.modules.activation.GELU", "use_residual": False,
    }),
    ("LayerNorm", {"dimension": _HIDDEN, "use_residual": False}),
    ("Dense", {
        "in_features": _HIDDEN, "out_features": 1, "bias": True, "activation_function": IDENTITY,
        "module_output_name": "scores", "use_residual": False,
    }),
)  # fmt: skip
# What the config of a plain checkpoint says.
_PLAIN: dict[str, Any] = {
    "model_type": "modernbert", "hidden_activation": "gelu", "classifier_activation": "gelu",
    "quantization_config": None,
}  # fmt: skip
_BIASES = ("attention", "mlp", "norm", "classifier")  # see `ModelShape.biases`
# Keys that a config may leave out: their value is then the one above.
_OPTIONAL = {
    "hidden_activation", "classifier_activation", "attention_bias", "mlp_bias", "norm_bias", "quantization_config",
    "use_residual",
}  # fmt: skip
_OLD_ACTIVATION = "sbert_ce_default_activation_function"


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint; its weights are read later."""

    folder: Path
    id: str  # hub id, or the folder's name
    revision: str | None  # hub commit; None for a folder
    is_random: bool  # made by `--random-weights`
    shape: ModelShape
    head_folders: tuple[str, ...]  # of the three head modules, in order; none in a plain checkpoint
    activation: Literal["identity", "sigmoid"]  # what CrossEncoder applies to the logit
    max_length_tokens: int  # what CrossEncoder truncates to

    @property
    def is_plain(self) -> bool:
        """Whether it is a `ModernBertForSequenceClassification`, with its head in the same file as the encoder."""
        return not self.head_folders

    @property
    def name(self) -> str:
        """Folder name of its artifacts."""
        return self.id.split("/")[-1] + ("-random" if self.is_random else "")

    def weights_sha256(self) -> str:
        """Checksum over the names and checksums of all weight files."""
        digest = hashlib.sha256()
        encoder = sorted(self.folder.glob("model*.safetensors"))
        for path in (*encoder, *(self.folder / module / "model.safetensors" for module in self.head_folders)):
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
        folder: the checkpoint, plain or in the modular format of sentence-transformers 5.
        id: its hub id; None: the folder's name.
        revision: its hub commit.
        is_random: made by `--random-weights`.

    Raises:
        CheckpointError: a file is missing or unreadable.
        UnsupportedCheckpoint: not this architecture; says what was found and what was expected.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    modules = _module_folders(folder)
    head = modules[1:]
    shape = _shape(folder / "config.json", is_plain=not modules)
    if modules:
        _check_pooling(folder / modules[0])
        _check_head(folder, head, shape)
    for part in (folder, *(folder / module for module in head)):
        _check_weight_files(part)
    checkpoint = Checkpoint(
        folder=folder,
        id=id or folder.resolve().name,
        revision=revision,
        is_random=is_random,
        shape=shape,
        head_folders=tuple(head),
        activation=_activation(folder),
        max_length_tokens=_max_length(folder, shape),
    )
    try:
        checked_file_name(checkpoint.name)
    except ValueError as error:
        raise CheckpointError(f"{folder}: artifacts are named after it, but the name {error}. Rename it") from None
    return checkpoint


def _refuse(path: Path, what: str, value: object, expected: str) -> NoReturn:
    raise UnsupportedCheckpoint(f"{path}: {what} is {value!r}, expected {expected}: this model can't be exported")


def _check(path: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if config.get(key, value if key in _OPTIONAL else None) != value:
            _refuse(path, key, config.get(key), repr(value))


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


def _module_folders(folder: Path) -> list[str]:
    """Folders of the modules behind the encoder, in order; none if the checkpoint is plain."""
    path, config = folder / "modules.json", folder / "config.json"
    try:
        rows = json.loads(path.read_text()) if path.is_file() else []
        modules = [(str(row["type"]).split(".")[-1], str(row["path"])) for row in rows]
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path}: not a list of modules") from None
    kinds, expected = (", ".join(kind for kind, _ in rows) for rows in (modules, _MODULES))
    architectures = _json(config).get("architectures") if config.is_file() else None
    if kinds in ("", "Transformer") and architectures == [CLASS]:
        if modules:
            path = folder / "sentence_bert_config.json"
            _check(path, _json(path), {"transformer_task": "sequence-classification"})
        return []
    if not modules:
        raise UnsupportedCheckpoint(
            f"{folder}: no modules.json (architectures: {architectures}), expected a modular CrossEncoder or a {CLASS}"
        )
    if kinds != expected:
        _refuse(path, "the list of modules", kinds, expected)
    if modules[0][1]:
        _refuse(path, "the encoder's folder", modules[0][1], "the checkpoint's own folder")
    return [name for _, name in modules[1:]]


def _check_head(folder: Path, modules: list[str], shape: ModelShape) -> None:
    for module, (_, expected) in zip(modules, _MODULES[2:], strict=True):
        path = folder / module / "config.json"
        values = {key: shape.hidden_size if value is _HIDDEN else value for key, value in expected.items()}
        _check(path, _json(path), values)


def _activation(folder: Path) -> Literal["identity", "sigmoid"]:
    """What CrossEncoder applies to the logit.

    It reads config_sentence_transformers.json only beside a modules.json. Before version 4 it wrote a key of its own.
    """
    settings = _json(folder / "config_sentence_transformers.json") if (folder / "modules.json").is_file() else {}
    if settings.get("default_prompt_name") is not None:
        _refuse(folder, "default_prompt_name", settings["default_prompt_name"], "none (prompts are not applied)")
    config = _json(folder / "config.json")
    stated = (settings, config.get("sentence_transformers"), {"activation_fn": config.get(_OLD_ACTIVATION)})
    names = [entry["activation_fn"] for entry in stated if isinstance(entry, dict) and entry.get("activation_fn")]
    if names and names[0] not in (IDENTITY, SIGMOID):
        _refuse(folder, "activation_fn", names[0], "Identity or Sigmoid")
    # Without a name, CrossEncoder applies a sigmoid to the score of one label.
    return "identity" if names and names[0] == IDENTITY else "sigmoid"


def _check_pooling(folder: Path) -> None:
    """Refuses any pooling but that of [CLS]. Older checkpoints have one boolean key for each mode."""
    config, prefix = _json(folder / "config.json"), "pooling_mode_"
    mode = config.get("pooling_mode") or [
        key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value
    ]
    if mode not in ("cls", ["cls"], ["cls_token"]):
        _refuse(folder, "pooling", mode, "cls")


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    _check(path, config, _PLAIN)
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # what transformers assumes
    if count != 1:
        _refuse(path, "the number of labels", count, "1")
    if config.get("classifier_pooling", "cls") not in ("cls", "mean"):
        _refuse(path, "classifier_pooling", config["classifier_pooling"], "'cls' or 'mean'")


def _shape(path: Path, *, is_plain: bool) -> ModelShape:
    config = _json(path)
    if is_plain:
        _check_plain(path, config)
    else:
        _check(path, config, _MODULES[0][1])
    try:
        layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
        period = config.get("global_attn_every_n_layers", 3)
        kinds = config.get("layer_types") or [
            "sliding_attention" if layer % period else "full_attention" for layer in range(layers)
        ]
        if len(kinds) != layers or not set(kinds) <= ROPE_BASES.keys():
            _refuse(path, "layer_types", kinds, f"{layers} of {', '.join(ROPE_BASES)}")
        if hidden % heads or (hidden // heads) % 2:
            _refuse(path, "hidden_size / num_attention_heads", f"{hidden} / {heads}", "an even head dimension")
        theta_global, theta_local = (_rope_base(path, config, kind) for kind in ROPE_BASES)
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
            head_norm_eps=config["norm_eps"] if is_plain else 1e-5,
            max_tokens=config["max_position_embeddings"],
            pad_token_id=config["pad_token_id"],
            pooling=config.get("classifier_pooling", "cls") if is_plain else "cls",
            biases=tuple(kind for kind in _BIASES if is_plain and config.get(f"{kind}_bias")),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: has a value that ModernBERT can't have ({error})") from None


def _rope_base(path: Path, config: dict[str, Any], kind: str) -> float:
    """The RoPE base of the layers of one type.

    transformers 5 writes `rope_parameters`, transformers 4 `*_rope_theta`. Each reads the other's config with
    ModernBERT's defaults (local 10000, where Ettin has 160000) and says nothing. 10000 is right for most plain
    checkpoints, so what tells a misread config is that it states two bases: version 4 keeps both when it saves.
    """
    parameters = (config.get("rope_parameters") or {}).get(kind) or {}
    if parameters.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UnsupportedCheckpoint(f"{path}: scaled RoPE {parameters}, expected rope_type 'default'")
    old_key = ROPE_BASES[kind]
    bases = {value for value in (parameters.get("rope_theta"), config.get(old_key)) if value is not None}
    if not bases:
        raise UnsupportedCheckpoint(
            f"{path}: states no RoPE base for {kind} (neither rope_parameters nor {old_key}), and the default of "
            "ModernBERT is wrong for Ettin. Save the checkpoint again with transformers 5"
        )
    if len(bases) > 1:
        raise UnsupportedCheckpoint(f"{path}: states two RoPE bases for {kind}, {sorted(bases)}: {WRONG_BASE}")
    return float(bases.pop())


def _check_weight_files(folder: Path) -> None:
    if any(folder.glob("model*.safetensors")):
        return
    pickled = next(folder.glob("pytorch_model*.bin"), None)
    if pickled:
        raise UnsupportedCheckpoint(
            f"{pickled}: pickled weights can run code when they are read, so they are refused. "
            "Save them as safetensors: CrossEncoder(…).save_pretrained(DIR)"
        )
    raise CheckpointError(f"{folder}: no model.safetensors, so the checkpoint is not whole")


def _max_length(folder: Path, shape: ModelShape) -> int:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so this is not a whole checkpoint")
    vocabulary = PairTokenizer(path).vocab_size
    if vocabulary > shape.vocab_size:
        _refuse(path, "the vocabulary", vocabulary, f"at most {shape.vocab_size} (vocab_size of the encoder)")
    files = {"tokenizer_config.json": "model_max_length"}
    if (folder / "modules.json").is_file():
        files["sentence_bert_config.json"] = "max_seq_length"
    limits = [shape.max_tokens, *(_json(folder / name).get(key) for name, key in files.items())]
    return int(min(limit for limit in limits if limit is not None))
