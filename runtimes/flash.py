"""ModernBERT without padding on PyTorch's own FlashAttention-2 kernel.

The kernel is `torch.nn.attention.varlen.varlen_attn` (torch 2.11 or later), so nothing is downloaded or compiled.
`use_flash` puts it into transformers' stock model, which is the reference and the peer on GPUs; `graph.flash_graph` is
our own graph on the same kernel.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ettin.artifacts.errors import HardwareError
from ettin.runtimes.batch import Batch
from ettin.runtimes.graph.flash_graph import Kernel

_AMPERE = (8, 0)  # the first that the kernel is compiled for


def flash_kernel() -> Kernel:
    """PyTorch's kernel.

    Raises:
        HardwareError: no CUDA device that it runs on, or a torch without it.
    """
    if not torch.cuda.is_available():
        raise HardwareError("FlashAttention-2 runs on CUDA devices, torch finds none. Run: ettin-export --doctor")
    capability = torch.cuda.get_device_capability()
    if capability < _AMPERE:
        found = f"sm_{capability[0]}{capability[1]}"
        raise HardwareError(f"FlashAttention-2 needs sm_80 or later, {torch.cuda.get_device_name()} is {found}")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise HardwareError(f"torch {torch.__version__} has no varlen_attn. Run: pip install -U torch") from None
    return cast(Kernel, varlen_attn)


def use_flash(model: Any, kernel: Kernel) -> None:
    """Makes a transformers model attend with `kernel`; it then takes what `flash_logits` gives it, and nothing else.

    Args:
        model: a ModernBERT model of transformers 5, in bf16 for the real kernel.
        kernel: (q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size) → [tokens, heads, d], for q, k and v of that
            shape and int32 bounds; a window (w, w) lets each token see w to both sides, (−1, −1) all.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
        sliding_window: int | None, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        mixed = kernel(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
            window_size=window_size(sliding_window),
        )  # fmt: skip
        return mixed[None], None

    attend_with(model, f"ettin_{getattr(kernel, '__name__', 'kernel')}", attention, lambda *_, **__: None)


def window_size(sliding_window: int | None) -> tuple[int, int]:
    """A layer's window as kernels take it: transformers counts the token itself, 65 is 64 to both sides."""
    side = -1 if sliding_window is None else sliding_window - 1
    return side, side


def attend_with(model: Any, name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Gives a transformers model its own attention.

    Args:
        model: of transformers 5.
        name: without "flash" in it, which transformers 5.23 would look up on the hub.
        attention: see transformers' `AttentionInterface`.
        mask: see transformers' `AttentionMaskInterface`.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)


def packed_inputs(batch: Batch, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions, int64 [tokens], and bounds, int32 [pairs + 1], on a device."""
    lengths = np.diff(batch.cu_seqlens)
    positions = np.arange(len(batch.ids)) - np.repeat(batch.cu_seqlens[:-1], lengths)
    arrays = (batch.ids.astype(np.int64), positions, batch.cu_seqlens)
    ids, places, bounds = (torch.from_numpy(each).to(device, non_blocking=True) for each in arrays)
    return ids, places, bounds


def flash_logits(model: Any, batch: Batch, device: str | torch.device) -> Tensor:
    """Raw logits of the stock model.

    Args:
        model: a ModernBertForSequenceClassification after `use_flash`.
        batch: what is scored.
        device: where the model is.

    Returns:
        [pairs], of the model's type.
    """
    ids, positions, bounds = packed_inputs(batch, device)
    hidden = model.model(
        input_ids=ids[None],
        position_ids=positions[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=batch.longest,
        max_length_k=batch.longest,
    ).last_hidden_state
    logits: Tensor = model.classifier(model.head(hidden[0].index_select(0, bounds[:-1].long())))[:, 0]
    return logits
