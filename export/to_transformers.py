"""Checkpoint → the same model as a plain ModernBertForSequenceClassification checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ettin.artifacts.manifest import Needs
from ettin.export.classification import classification_tensors, write_configs
from ettin.export.lowering import PADDED, Lowered, Material

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformers_from_checkpoint(material: Material, precision: str, folder: Path) -> Lowered:
    """Writes `model.safetensors`, `config.json` and the tokenizer.

    Args:
        material: what is lowered.
        precision: "fp32" or "bf16".
        folder: where to.

    Raises:
        UnsupportedCheckpoint: see `classification_tensors`.
    """
    dtype = _DTYPES[precision]
    tensors = classification_tensors(material.checkpoint, material.weights)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_configs(material.checkpoint, folder, str(dtype).removeprefix("torch."))
    return Lowered(
        entry="model.safetensors",
        interface=PADDED,
        needs=Needs(device="any", isa=(), package="torch", version=torch.__version__),
    )
