"""The tensors of a checkpoint: read and checked, or drawn at random in a released shape."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ettin.artifacts.errors import CheckpointError
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.graph import ModelShape
from ettin.graph.fold import HEAD_DENSE, HEAD_NORM, HEAD_SCORE, modular_tensors

_BIASED = {"norm": "norm.", "attention": ".attn.", "mlp": ".mlp."}  # by the kind of bias: part of a tensor's name


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint."""

    encoder: dict[str, Tensor]  # by their names in `model.safetensors`
    head: dict[str, Tensor]  # by `<module>/<tensor>`, with the module names of `fold`


def read_weights(checkpoint: Checkpoint) -> Weights:
    """Reads all tensors.

    Raises:
        CheckpointError: a file is truncated, a tensor missing, unknown, or of another shape than the config says.
    """
    tensors, expected_head = _load_all(checkpoint.folder), head_shapes(checkpoint.shape)
    if checkpoint.is_plain:
        encoder, head = modular_tensors(tensors)
        if "norm" not in checkpoint.shape.biases:
            expected_head.pop(f"{HEAD_NORM}/norm.bias")
    else:
        encoder = tensors
        head = {
            f"{module}/{name}": tensor
            for module, folder in zip((HEAD_DENSE, HEAD_NORM, HEAD_SCORE), checkpoint.head_folders, strict=True)
            for name, tensor in _load(checkpoint.folder / folder / "model.safetensors").items()
        }
    _check(checkpoint.folder, encoder, encoder_shapes(checkpoint.shape))
    _check(checkpoint.folder, head, expected_head)
    return Weights(encoder, head)


def encoder_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the encoder's tensors, in the order in which random ones are drawn."""
    hidden, middle = shape.hidden_size, shape.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.tok_embeddings.weight": (shape.vocab_size, hidden),
        "embeddings.norm.weight": (hidden,),
        "final_norm.weight": (hidden,),
    }
    for layer in range(shape.num_layers):
        shapes |= {
            f"layers.{layer}.attn_norm.weight": (hidden,),
            f"layers.{layer}.attn.Wqkv.weight": (3 * hidden, hidden),
            f"layers.{layer}.attn.Wo.weight": (hidden, hidden),
            f"layers.{layer}.mlp_norm.weight": (hidden,),
            f"layers.{layer}.mlp.Wi.weight": (2 * middle, hidden),
            f"layers.{layer}.mlp.Wo.weight": (hidden, middle),
        }
    shapes.pop("layers.0.attn_norm.weight")  # the first layer reads the norm of the embeddings
    for name, (rows, *_) in list(shapes.items()):
        kind = next((kind for kind, part in _BIASED.items() if part in name), None)
        if kind in shape.biases:
            shapes[name.replace(".weight", ".bias")] = (rows,)
    return shapes


def head_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's tensors, in the order in which random ones are drawn."""
    hidden = shape.hidden_size
    dense_bias: dict[str, tuple[int, ...]] = {f"{HEAD_DENSE}/linear.bias": (hidden,)}
    return (dense_bias if "classifier" in shape.biases else {}) | {
        f"{HEAD_DENSE}/linear.weight": (hidden, hidden),
        f"{HEAD_NORM}/norm.weight": (hidden,),
        f"{HEAD_NORM}/norm.bias": (hidden,),
        f"{HEAD_SCORE}/linear.weight": (1, hidden),
        f"{HEAD_SCORE}/linear.bias": (1,),
    }


def _load_all(folder: Path) -> dict[str, Tensor]:
    """All shards of `model.safetensors`."""
    return {name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in _load(path).items()}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated weights ({error}). Download the checkpoint again"
        ) from None


def _check(folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    for problem, names in (("is missing", shapes.keys() - tensors), ("is unknown", tensors.keys() - shapes)):
        if names:
            raise CheckpointError(f"{folder}: tensor '{min(names)}' {problem} ({len(names)} in all)")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{folder}: tensor '{name}' is {tuple(tensor.shape)}, config.json says {shapes[name]}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{folder}: tensor '{name}' is {tensor.dtype}, expected floating point")


def write_random_checkpoint(folder: Path, shape: ModelShape, seed: int, tokenizer: Path = DEMO_FOLDER) -> None:
    """Writes a whole modular checkpoint, in fp32.

    Standard deviations keep activations near 1 and spread the logits over a few units, so that comparing scores
    means something.

    Args:
        folder: an existing, empty folder.
        shape: the shape; pad_token_id is replaced by the tokenizer's.
        seed: of the weights.
        tokenizer: folder with tokenizer.json and tokenizer_config.json. The embedded default has 8192 tokens: texts
            become about a fifth longer than with the released tokenizer.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = {name: _random(name, size, generator) for name, size in encoder_shapes(shape).items()}
    save_file(encoder, folder / "model.safetensors")
    head = {name: _random(name, size, generator) for name, size in head_shapes(shape).items()}
    for module in (HEAD_DENSE, HEAD_NORM, HEAD_SCORE):
        (folder / module).mkdir()
        tensors = {name.removeprefix(f"{module}/"): head[name] for name in head if name.startswith(module)}
        save_file(tensors, folder / module / "model.safetensors")
    _write_configs(folder, shape, tokenizer)


def _random(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(size, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if name.endswith("norm.bias"):
        return 0.1 * values
    if name.endswith("tok_embeddings.weight"):
        return values
    scale = 3.0 if name.startswith(HEAD_SCORE) else 1.5 if "Wqkv" in name else 1.0
    return values.mul(scale * float(size[-1]) ** -0.5)


def _write_configs(folder: Path, shape: ModelShape, tokenizer: Path) -> None:
    """Writes the configs of the embedded checkpoint, with another shape."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        shutil.copyfile(DEMO_FOLDER / name, folder / name)
    vocabulary = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    tokens = {"bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]", "sep": "[SEP]", "pad": "[PAD]"}
    kinds = {"full_attention": shape.rope_theta_global, "sliding_attention": shape.rope_theta_local}
    config = json.loads((DEMO_FOLDER / "config.json").read_text()) | {
        "dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "layer_types": ["full_attention" if is_global else "sliding_attention" for is_global in shape.global_layers],
        "local_attention": 2 * shape.window_tokens,
        "max_position_embeddings": shape.max_tokens,
        "norm_eps": shape.norm_eps,
        "rope_parameters": {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in kinds.items()},
    }
    config |= {f"{name}_token_id": vocabulary.token_to_id(token) for name, token in tokens.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "1_Pooling").mkdir()
    widths = {"embedding_dimension", "in_features", "dimension"}
    for module in ("1_Pooling", HEAD_DENSE, HEAD_NORM, HEAD_SCORE):
        settings = json.loads((DEMO_FOLDER / module / "config.json").read_text())
        settings |= dict.fromkeys(widths & settings.keys(), shape.hidden_size)
        if module == HEAD_DENSE:
            settings["out_features"] = shape.hidden_size
        (folder / module / "config.json").write_text(json.dumps(settings, indent=2))
