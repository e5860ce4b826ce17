"""Checkpoints of a released shape with seeded random weights, for trying hardware without a download."""

import json
import shutil
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from ettin.export.sizes import DEMO_FOLDER
from ettin.export.weights import encoder_shapes, head_shapes
from ettin.runtimes.graph import ModelShape


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
