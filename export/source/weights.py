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
from ettin.graph.fold import HEAD_DENSE, HEAD_NORM, HEAD_SCORE


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint.

    Args:
        encoder: by their names in `model.safetensors`.
        head: by `<module>/<tensor>`, with the module names of `fold`.
    """

    encoder: dict[str, Tensor]
    head: dict[str, Tensor]


def read_weights(checkpoint: Checkpoint) -> Weights:
    """Reads all tensors.

    Raises:
        CheckpointError: a file is truncated, a tensor missing, unknown, or of another shape than the config says.
    """
    encoder: dict[str, Tensor] = {}
    for path in sorted(checkpoint.folder.glob("model*.safetensors")):
        encoder.update(_load(path))
    _check(checkpoint.folder, encoder, encoder_shapes(checkpoint.shape))
    head = {
        f"{module}/{name}": tensor
        for module, folder in zip((HEAD_DENSE, HEAD_NORM, HEAD_SCORE), checkpoint.head_folders, strict=True)
        for name, tensor in _load(checkpoint.folder / folder / "model.safetensors").items()
    }
    _check(checkpoint.folder, head, head_shapes(checkpoint.shape))
    return Weights(encoder, head)


def encoder_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the encoder's tensors."""
    hidden, middle = shape.hidden_size, shape.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.tok_embeddings.weight": (shape.vocab_size, hidden),
        "embeddings.norm.weight": (hidden,),
        "final_norm.weight": (hidden,),
    }
    for layer in range(shape.num_layers):
        at = f"layers.{layer}."
        if layer:
            shapes[at + "attn_norm.weight"] = (hidden,)
        shapes[at + "attn.Wqkv.weight"] = (3 * hidden, hidden)
        shapes[at + "attn.Wo.weight"] = (hidden, hidden)
        shapes[at + "mlp_norm.weight"] = (hidden,)
        shapes[at + "mlp.Wi.weight"] = (2 * middle, hidden)
        shapes[at + "mlp.Wo.weight"] = (hidden, middle)
    return shapes


def head_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's tensors."""
    hidden = shape.hidden_size
    return {
        f"{HEAD_DENSE}/linear.weight": (hidden, hidden),
        f"{HEAD_NORM}/norm.weight": (hidden,),
        f"{HEAD_NORM}/norm.bias": (hidden,),
        f"{HEAD_SCORE}/linear.weight": (1, hidden),
        f"{HEAD_SCORE}/linear.bias": (1,),
    }


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated weights ({error}). Download the checkpoint again"
        ) from None


def _check(folder: Path, found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
    if unknown:
        raise CheckpointError(f"{folder}: unknown tensor '{unknown[0]}' ({len(unknown)} in all)")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise CheckpointError(f"{folder}: tensor '{name}' is {tuple(found[name].shape)}, config.json says {shape}")
        if not found[name].is_floating_point():
            raise CheckpointError(f"{folder}: tensor '{name}' is {found[name].dtype}, expected floating point")


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

    def drawn(name: str, size: tuple[int, ...]) -> Tensor:
        values = torch.randn(size, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * values
        if name.endswith("norm.bias"):
            return 0.1 * values
        if name.endswith("tok_embeddings.weight"):
            return values
        scale = 3.0 if name.startswith("4_Dense") else 1.5 if "Wqkv" in name else 1.0
        spread: Tensor = values * (scale * float(size[-1]) ** -0.5)
        return spread

    save_file({name: drawn(name, size) for name, size in encoder_shapes(shape).items()}, folder / "model.safetensors")
    head: dict[str, dict[str, Tensor]] = {}
    for name, size in head_shapes(shape).items():
        module, tensor = name.split("/")
        head.setdefault(module, {})[tensor] = drawn(name, size)
    for module, tensors in head.items():
        (folder / module).mkdir()
        save_file(tensors, folder / module / "model.safetensors")
    _write_configs(folder, shape, tokenizer)


def _write_configs(folder: Path, shape: ModelShape, tokenizer: Path) -> None:
    """The embedded checkpoint's configs with another shape: the format is the same."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        shutil.copyfile(DEMO_FOLDER / name, folder / name)
    vocabulary = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    cls, sep, pad = (vocabulary.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    config |= {
        "dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "layer_types": ["full_attention" if each else "sliding_attention" for each in shape.global_layers],
        "local_attention": 2 * shape.window_tokens,
        "max_position_embeddings": shape.max_tokens,
        "norm_eps": shape.norm_eps,
        "rope_parameters": {
            "full_attention": {"rope_theta": shape.rope_theta_global, "rope_type": "default"},
            "sliding_attention": {"rope_theta": shape.rope_theta_local, "rope_type": "default"},
        },
        "bos_token_id": cls,
        "cls_token_id": cls,
        "eos_token_id": sep,
        "sep_token_id": sep,
        "pad_token_id": pad,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "1_Pooling").mkdir()
    widths = {"embedding_dimension", "in_features", "dimension"}
    for module in ("1_Pooling", "2_Dense", "3_LayerNorm", "4_Dense"):
        settings = json.loads((DEMO_FOLDER / module / "config.json").read_text())
        settings |= dict.fromkeys(widths & settings.keys(), shape.hidden_size)
        if module == "2_Dense":
            settings["out_features"] = shape.hidden_size
        (folder / module / "config.json").write_text(json.dumps(settings, indent=2))
