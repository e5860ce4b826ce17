"""Checkpoint → the same model as a plain ModernBertForSequenceClassification checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ettin.artifacts.errors import UnsupportedCheckpoint
from ettin.artifacts.manifest import Needs
from ettin.export.source.checkpoint import CLASS, IDENTITY, SIGMOID, Checkpoint
from ettin.export.source.weights import Weights, read_weights
from ettin.export.writer import PADDED, Lowered, Model, Writer
from ettin.graph.fold import HEAD_NORM, HEAD_SCORE, PLAIN_HEAD, Affine

_SPECIAL_TOKENS = ("cls_token", "mask_token", "pad_token", "sep_token", "unk_token")
_LOCAL_KEYS = {"backend", "is_local", "local_files_only"}  # what transformers 5 notes about its own loading


def classification_tensors(checkpoint: Checkpoint, weights: Weights) -> dict[str, Tensor]:
    """Its state dict. A bias that the class has no place for, that of the head's norm, is folded into the classifier's.

    Raises:
        UnsupportedCheckpoint: the encoder's epsilon is not the head's; the class has one for both.
    """
    shape = checkpoint.shape
    if shape.norm_eps != shape.head_norm_eps:
        raise UnsupportedCheckpoint(
            f"{checkpoint.folder}: norm_eps is {shape.norm_eps}, the head's is {shape.head_norm_eps}, and {CLASS} has "
            "one for both. Export another target: --target onnx"
        )
    head = dict(weights.head)
    if not checkpoint.is_plain:
        norm_bias = head.pop(f"{HEAD_NORM}/norm.bias").double()
        score = Affine.of(head, f"{HEAD_SCORE}/linear").behind(Affine(torch.ones_like(norm_bias), norm_bias))
        head |= {f"{HEAD_SCORE}/linear.{part}": tensor.float() for part, tensor in score._asdict().items()}
    modules = {modular: plain for plain, modular in PLAIN_HEAD.items()}
    renamed = {name: name.rpartition(".") for name in head}
    return {f"model.{name}": tensor for name, tensor in weights.encoder.items()} | {
        f"{modules[module]}.{part}": head[name] for name, (module, _, part) in renamed.items()
    }


def write_configs(checkpoint: Checkpoint, folder: Path, dtype: str = "float32") -> None:
    """Writes `config.json`, `tokenizer_config.json` and `special_tokens_map.json` for other programs.

    Both generations of keys are there: transformers 5 reads `rope_parameters` and `layer_types`; transformers 4,
    llama.cpp's converter and servers read `*_rope_theta` and `global_attn_every_n_layers`. `tokenizer_class` is the
    one that both generations know (5 writes "TokenizersBackend", which 4 can't load).
    """
    shape = checkpoint.shape
    config: dict[str, Any] = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "architectures": [CLASS],
        "dtype": dtype,
        "torch_dtype": dtype,
        "classifier_pooling": shape.pooling,
        "classifier_activation": "gelu",
        "classifier_bias": "classifier" in shape.biases,
        "num_labels": 1,
        "layer_norm_eps": shape.norm_eps,
        # Layers from the first, which is global, to the next global one.
        "global_attn_every_n_layers": (*shape.global_layers[1:], True).index(True) + 1,
        "global_rope_theta": shape.rope_theta_global,
        "local_rope_theta": shape.rope_theta_local,
        # What sentence-transformers' CrossEncoder reads; without it, it would apply a sigmoid.
        "sentence_transformers": {"activation_fn": IDENTITY if checkpoint.activation == "identity" else SIGMOID},
    }
    if not checkpoint.is_plain:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    tokenizer = json.loads((checkpoint.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = {key: value for key, value in tokenizer.items() if key not in _LOCAL_KEYS}
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = {key: tokenizer[key] for key in _SPECIAL_TOKENS if key in tokenizer}
    contents = {"config.json": config, "tokenizer_config.json": tokenizer, "special_tokens_map.json": special}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class TransformersWriter(Writer):
    """Writes `model.safetensors`, `config.json` and the tokenizer's config."""

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        tensors = classification_tensors(model.checkpoint, read_weights(model.checkpoint))
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_configs(model.checkpoint, folder, str(dtype).removeprefix("torch."))
        return Lowered(
            entry="model.safetensors",
            interface=PADDED,
            needs=Needs(device="any", isa=(), package="torch", version=torch.__version__),
        )
