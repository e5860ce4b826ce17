"""The inference graph against the checkpoint's own graph, before anything is lowered."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.modernbert.modeling_modernbert as modernbert
from support import PLAIN

from ettin.artifacts import tolerances
from ettin.export.reference import load_gold
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.weights import read_weights
from ettin.graph import GraphForm
from ettin.graph.fold import inference_weights
from ettin.graph.torch_ops import InferenceGraph

# Batches of lengths; the first row of each is its longest, the others are padded.
GRID = [
    [1],
    [8, 1],
    [66, 65, 64, 63],
    [130, 129, 128, 127, 5],
    [193, 192, 191],
    [512, 256],
    [513, 20],
    [577, 512],
    [2048, 70],
]


def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """transformers rotates in float32 whatever the model's dtype; for a proof in float64 that cast is lifted."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(x * cos + modernbert.rotate_half(x) * sin for x in (q, k))  # type: ignore[return-value]


def batches(checkpoint: Checkpoint, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and attention masks of the grid, without lengths over `most`."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, pad = min(8187, checkpoint.shape.vocab_size), checkpoint.shape.pad_token_id
    for lengths in GRID:
        if lengths[0] > most:
            continue
        mask = (torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(0, vocab_size, mask.shape, generator=generator)
        yield torch.where(mask.bool(), ids, pad), mask


@cache
def gold_scores(checkpoint: Checkpoint, dtype: torch.dtype, most: int) -> list[torch.Tensor]:
    """The checkpoint's own scores of the grid, once for all forms that are compared with them."""
    gold, scores = load_gold(checkpoint, dtype), []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if dtype == torch.float64:
            patch.setattr(modernbert, "apply_rotary_pos_emb", rotate)
        for ids, mask in batches(checkpoint, most):
            scores.append(gold({"input_ids": ids, "attention_mask": mask})["scores"])
    return scores


def largest_error(checkpoint: Checkpoint, dtype: torch.dtype, form: GraphForm | None = None, most: int = 2048) -> float:
    """Largest |Δ| over the grid, each divided by max(1, |gold|)."""
    weights = read_weights(checkpoint)
    graph = InferenceGraph(
        inference_weights(weights.encoder, weights.head, checkpoint.shape, dtype), checkpoint.shape, form
    )
    worst = 0.0
    golds = gold_scores(checkpoint, dtype, most)
    for (ids, mask), expected in zip(batches(checkpoint, most), golds, strict=True):
        found = graph(ids, mask)
        assert found.shape == (len(ids), 1) and found.dtype == dtype
        worst = max(worst, float(((found - expected).abs() / expected.abs().clamp(min=1)).max()))
    return worst


def test_demo_equals_the_checkpoint_in_float64(demo: Checkpoint) -> None:
    assert largest_error(demo, torch.float64) <= tolerances.REWRITE_FLOAT64


@pytest.mark.parametrize("form", [GraphForm(), GraphForm(rotate_blocks=True)])
def test_another_shape_equals_the_checkpoint_in_float64(tiny: Checkpoint, form: GraphForm) -> None:
    assert largest_error(tiny, torch.float64, form) <= tolerances.REWRITE_FLOAT64


@pytest.mark.parametrize("form", [GraphForm(), GraphForm(rotate_blocks=True)])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_equals_the_checkpoint_in_float64(plain: Callable[[str], Checkpoint], kind: str, form: GraphForm) -> None:
    # What is special about them has nothing to do with the number of blocks.
    assert largest_error(plain(kind), torch.float64, form, most=577) <= tolerances.REWRITE_FLOAT64


@pytest.mark.parametrize("form", [GraphForm(200), GraphForm(192, 16), GraphForm(4000), GraphForm(rotate_blocks=True)])
def test_every_form_equals_the_checkpoint_in_float64(demo: Checkpoint, form: GraphForm) -> None:
    assert largest_error(demo, torch.float64, form) <= tolerances.REWRITE_FLOAT64


def test_demo_equals_the_checkpoint_in_fp32(demo: Checkpoint) -> None:
    assert largest_error(demo, torch.float32) <= tolerances.FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trained_17m_shape_equals_the_checkpoint(shared: Callable[[str], Path], dtype: torch.dtype) -> None:
    checkpoint = read_checkpoint(shared("checkpoints/17m-lexical"))
    limit, most = (tolerances.REWRITE_FLOAT64, 577) if dtype == torch.float64 else (tolerances.FP32, 2048)
    assert largest_error(checkpoint, dtype, most=most) <= limit


def test_longest_input_equals_the_checkpoint(demo: Checkpoint) -> None:
    weights = read_weights(demo)
    graph = InferenceGraph(inference_weights(weights.encoder, weights.head, demo.shape), demo.shape)
    ids = torch.randint(0, 8187, (1, 7999), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        expected = load_gold(demo)({"input_ids": ids, "attention_mask": mask})["scores"]
    assert float((graph(ids, mask) - expected).abs().max()) <= tolerances.FP32 * max(1.0, float(expected.abs().max()))


def test_a_threshold_below_one_key_span_is_refused(demo: Checkpoint) -> None:
    weights = read_weights(demo)
    folded = inference_weights(weights.encoder, weights.head, demo.shape)
    graph = InferenceGraph(folded, demo.shape, GraphForm(block_threshold_tokens=191))
    with pytest.raises(ValueError, match="below one key span 192"):
        graph(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))
