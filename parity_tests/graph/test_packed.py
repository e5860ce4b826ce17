"""The packed graph against the padded one, which is proven against the checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support import PLAIN
from torch import Tensor

from ettin.artifacts import tolerances
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import read_weights
from ettin.export.targets.to_onnx import packed_onnx
from ettin.export.writer import rewrite
from ettin.graph import GraphForm
from ettin.graph.fold import inference_weights
from ettin.graph.torch_ops import InferenceGraph, PackedGraph

# Lengths of the sequences of a pack: the window's edges, one token, whole and broken blocks, many short ones.
PACKS = [
    [1],
    [3],
    [64],
    [1, 1, 1],
    [63, 64, 65, 66],
    [127, 1, 128, 129, 130],
    [191, 192, 193],
    [5, 700, 8, 257, 31],
    [2048, 3],
    list(range(1, 60)),
]


def weights_of(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = read_weights(checkpoint)
    return inference_weights(weights.encoder, weights.head, checkpoint.shape, dtype)


def sequences(lengths: Sequence[int], vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


def packed(rows: Sequence[Tensor], room: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, cu_seqlens, longest; `room`: how much longer than needed the longest length is said to be."""
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return torch.cat(list(rows)), lengths.cumsum(0), torch.zeros(int(lengths.max()) + room, dtype=torch.int64)


def one_by_one(graph: InferenceGraph, rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([graph(row[None], torch.ones_like(row)[None]) for row in rows])


@pytest.mark.parametrize("which", ["demo", "tiny", *PLAIN])
def test_packed_equals_one_by_one_in_float64(
    which: str, request: pytest.FixtureRequest, plain: Callable[[str], Checkpoint]
) -> None:
    checkpoint: Checkpoint = plain(which) if which in PLAIN else request.getfixturevalue(which)
    weights = weights_of(checkpoint, torch.float64)
    single, together = InferenceGraph(weights, checkpoint.shape), PackedGraph(weights, checkpoint.shape)
    # What is special about plain checkpoints has nothing to do with the number of blocks.
    for lengths in (pack for pack in PACKS if which not in PLAIN or max(pack) <= 700):
        rows = sequences(lengths, 8187)
        expected = one_by_one(single, rows)
        for room in (0, 100):
            found = together(*packed(rows, room))
            assert found.shape == (len(rows), 1)
            error = ((found - expected).abs() / expected.abs().clamp(min=1)).max()
            assert error <= tolerances.REWRITE_FLOAT64, (lengths, room)


@pytest.mark.parametrize("block_tokens", [32, 128])
def test_block_size_changes_no_score(tiny: Checkpoint, block_tokens: int) -> None:
    weights = weights_of(tiny, torch.float64)
    form = GraphForm(block_tokens=block_tokens)
    rows = sequences([70, 300, 5], 8187)
    expected = one_by_one(InferenceGraph(weights, tiny.shape), rows)
    torch.testing.assert_close(PackedGraph(weights, tiny.shape, form)(*packed(rows)), expected, atol=1e-8, rtol=0)


def test_longest_input_among_others(demo: Checkpoint) -> None:
    weights = weights_of(demo, torch.float32)
    rows = sequences([7999, 12, 2500], 8187)
    expected = one_by_one(InferenceGraph(weights, demo.shape), rows)
    torch.testing.assert_close(PackedGraph(weights, demo.shape)(*packed(rows)), expected, atol=1e-4, rtol=1e-4)


def test_two_hundred_documents(demo: Checkpoint) -> None:
    weights = weights_of(demo, torch.float32)
    lengths = np.random.default_rng(0).integers(3, 120, 200).tolist()
    rows = sequences(lengths, 8187)
    expected = one_by_one(InferenceGraph(weights, demo.shape), rows)
    torch.testing.assert_close(PackedGraph(weights, demo.shape)(*packed(rows)), expected, atol=1e-4, rtol=1e-4)


def test_a_neighbour_changes_nothing(demo: Checkpoint) -> None:
    graph = PackedGraph(weights_of(demo, torch.float64), demo.shape)
    first, other, another = sequences([40, 70, 9], 8187)
    alone = graph(*packed([first, other]))[0]
    torch.testing.assert_close(graph(*packed([first, another]))[0], alone, atol=1e-10, rtol=0)
    torch.testing.assert_close(graph(*packed([another, first]))[1], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("which", ["tiny", "biased mean"])
def test_onnx_form_in_onnx_runtime(
    which: str, tiny: Checkpoint, plain: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny if which == "tiny" else plain(which)
    weights = weights_of(checkpoint, torch.float32)
    packed_onnx(rewrite(checkpoint), "float32", tmp_path / "packed.onnx")
    session = ort.InferenceSession(str(tmp_path / "packed.onnx"), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for lengths in PACKS:
        feeds = packed(sequences(lengths, 8187), room=7)
        expected = PackedGraph(weights, checkpoint.shape)(*feeds).numpy()
        (found,) = session.run(None, {name: each.numpy() for name, each in zip(names, feeds, strict=True)})
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
