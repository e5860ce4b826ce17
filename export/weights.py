"""Reads a checkpoint's tensors, and refuses any that are missing, truncated or of another shape."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ettin.artifacts.errors import CheckpointError
from ettin.export.checkpoint import Checkpoint
from ettin.runtimes.graph import ModelShape
from ettin.runtimes.graph.fold import HEAD_DENSE, HEAD_NORM, HEAD_SCORE


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
