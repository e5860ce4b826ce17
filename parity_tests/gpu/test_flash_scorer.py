"""The scorer in all its forms on a CPU: stand-ins for the attention kernel and for the capture of a CUDA graph."""

import sys
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support import TINY
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ettin.artifacts.errors import MissingDependency
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import read_weights
from ettin.gpu.engines.buckets import Bucket
from ettin.gpu.engines.flash import FlashGraph, packed_inputs
from ettin.gpu.engines.flash_scorer import SCORERS, FlashOptions, FlashScorer, Recordings
from ettin.gpu.visit.models import plain_varlen
from ettin.graph.fold import inference_weights
from ettin.runtimes.batch import Batch

LENGTHS: list[list[int]] = [
    [2], [3, 1], [63, 64, 65, 66], [5, 300, 8, 257], [7] * 40,
]  # fmt: skip


@torch.library.custom_op("ettin_test::varlen", mutates_args=())
def varlen_operation(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, side: int
) -> Tensor:
    """The stand-in as an operation that tracers do not look into, as torch's own kernel is."""
    return plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(side, side))


@varlen_operation.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def varlen(*arguments: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    return varlen_operation(*arguments, scale, window_size[0])


def traced(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In the place of a capture: what was run once is run again, whatever Python would decide now."""
    replay: Callable[[], Tensor] = make_fx(run)()
    return replay


def as_is(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In the place of a capture of what can't be traced: compiled graphs, and kernels in Triton's interpreter."""
    return run


def batch_of(lengths: Sequence[int], seed: int = 0) -> Batch:
    generator = np.random.default_rng(sum(lengths) + seed)
    return Batch.of([generator.integers(0, 8000, length).astype(np.int32) for length in lengths], TINY.pad_token_id)


@pytest.fixture(params=["tiny", "biased mean"])
def checkpoint(request: pytest.FixtureRequest, plain: Callable[[str], Checkpoint]) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue("tiny") if request.param == "tiny" else plain(request.param)
    return found


def folded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = read_weights(checkpoint)
    return inference_weights(tensors.encoder, tensors.head, checkpoint.shape, torch.float64)


def plain_scores(graph: FlashGraph, batch: Batch) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return graph(*packed_inputs(batch, "cpu"), batch.longest).numpy()


def assert_equal(found: Any, expected: Any, tolerance: float) -> None:
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


# Equal scores.


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_the_plain_graph(name: str, checkpoint: Checkpoint) -> None:
    kernels, launches = name.split(", ")
    if kernels == "triton":
        pytest.importorskip("triton", reason="needs triton, which has wheels for Linux only")
    # Triton's interpreter is slow, and its kernels compute in float32.
    dtype, cases = (torch.float32, [[3, 1], [30, 33]]) if kernels == "triton" else (torch.float64, LENGTHS)
    weights, capture = folded(checkpoint), traced if kernels == "torch" else as_is
    scorer = SCORERS[name](weights, checkpoint.shape, varlen, device="cpu", dtype=dtype, capture=capture)
    expected = FlashGraph(weights, checkpoint.shape, varlen, torch.float64)
    with torch.compiler.set_stance(force_backend="eager"):
        for seed in range(3):  # the second time is recorded, the third replayed
            for lengths in cases:
                batch = batch_of(lengths, seed)
                # In float64 up to the rounding of scores.
                tolerance = 2e-5 if dtype == torch.float32 else 1e-7
                assert_equal(scorer(batch), plain_scores(expected, batch), tolerance)
    assert (scorer._recordings is not None and len(scorer._recordings._kept) > 0) == (launches == "cuda-graphs")


def test_other_lengths_of_a_bucket_replay(checkpoint: Checkpoint) -> None:
    weights = folded(checkpoint)
    captures = []

    def counted(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captures.append(run)
        return traced(run)

    options = FlashOptions(launches="cuda-graphs")
    scorer = FlashScorer(
        weights, checkpoint.shape, varlen, options, device="cpu", dtype=torch.float64, capture=counted
    )  # fmt: skip
    graph = FlashGraph(weights, checkpoint.shape, varlen, torch.float64)
    cases = [batch_of(lengths) for lengths in ([40, 60, 80], [61, 70, 50], [90, 88], [33, 33, 33, 34, 40], [70, 100])]
    assert len({Bucket.recurring(batch) for batch in cases}) == 1
    for batch in cases:
        assert_equal(scorer(batch), plain_scores(graph, batch), 1e-7)
    assert len(captures) == 1
    large = batch_of([1000] * 17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "_launched", lambda buffer, bucket: buffer.new_full((bucket.pairs,), 7.0))
        assert scorer(large).tolist() == [7.0] * 17  # over `graph_tokens`: as it is
    assert len(scorer._recordings._seen) == 1  # type: ignore[union-attr]


def test_threads_share_a_scorer(tiny: Checkpoint) -> None:
    weights = folded(tiny)
    options = FlashOptions(launches="cuda-graphs")
    scorer = FlashScorer(weights, tiny.shape, varlen, options, device="cpu", dtype=torch.float64, capture=traced)
    graph = FlashGraph(weights, tiny.shape, varlen, torch.float64)
    batches = [batch_of([40, 60, 80], seed) for seed in range(4)]
    expected = [plain_scores(graph, batch) for batch in batches]
    wrong = []

    def work(index: int) -> None:
        for _ in range(10):
            if not np.allclose(scorer(batches[index]), expected[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Buckets.


def test_filled_batches() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        most = int(generator.integers(2, 400))
        batch = batch_of(generator.integers(1, most, generator.integers(1, 60)).tolist())
        for make in (Bucket.exact, Bucket.even, Bucket.recurring):
            bucket = make(batch)
            buffer = np.full(bucket.size, -7, np.int32)
            bucket.fill(batch, buffer)
            ids, positions, bounds = (part.numpy() for part in bucket.parts(torch.from_numpy(buffer)))
            count, tokens = len(batch), len(batch.ids)
            assert len(ids) == len(positions) == bucket.tokens and len(bounds) == bucket.pairs + 1
            np.testing.assert_array_equal(ids[:tokens], batch.ids)
            assert (ids[tokens:] == batch.pad_token_id).all()
            np.testing.assert_array_equal(bounds[: count + 1], batch.cu_seqlens)
            # What is added covers the rest, in sequences no longer than the batch's own, whose first tokens exist.
            assert bounds[-1] == bucket.tokens and (bounds[:-1] < bucket.tokens).all()
            assert np.diff(bounds).min() >= 0 and np.diff(bounds).max() <= batch.longest <= bucket.longest
            assert positions.tolist() == [at for start, end in pairwise(bounds) for at in range(end - start)]
            assert bucket == Bucket.exact(batch) or bucket.pairs > count
            assert bucket.tokens <= max(tokens + 64, 1.13 * tokens)


def test_few_buckets_recur() -> None:
    generator = np.random.default_rng(0)
    batches = [batch_of(generator.integers(20, 512, pairs).tolist()) for pairs in range(1, 60) for _ in range(10)]
    buckets = {Bucket.recurring(batch) for batch in batches}
    assert len({len(batch.ids) for batch in batches}) > 500 and len(buckets) < 110


# Recordings.


def test_recordings_are_bounded() -> None:
    captured: list[int] = []

    def run(buffer: Tensor, bucket: Bucket) -> Tensor:
        return buffer[: bucket.pairs] * 2

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captured.append(len(run()))
        return run

    recordings = Recordings(run, capture, "cpu", 2)

    def ask(pairs: int) -> None:
        buffer = torch.arange(10) + pairs
        assert recordings(buffer, Bucket(1, pairs, 1)).tolist() == (buffer[:pairs] * 2).tolist()

    for pairs in (3, 4, 5):
        ask(pairs)
    assert captured == []  # a size that is seen once is not recorded
    for pairs in (3, 4, 3, 5, 3):  # 5 replaces 4, which was used before 3
        ask(pairs)
    assert captured == [3, 4, 5] and [bucket.pairs for bucket in recordings._kept] == [5, 3]
    ask(4)
    assert captured == [3, 4, 5, 4]


# torch.compile.


def test_one_compiled_form_takes_all_shapes(checkpoint: Checkpoint) -> None:
    weights, compiled = folded(checkpoint), []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    with torch.compiler.set_stance(force_backend=backend):
        scorer = SCORERS["compiled, eager"](weights, checkpoint.shape, varlen, device="cpu", dtype=torch.float64)
        for lengths in LENGTHS:
            scorer(batch_of(lengths))
    assert len(compiled) == 1


def test_torchs_kernel_can_be_traced(tiny: Checkpoint) -> None:
    """Nothing is run, as there is no such kernel for a CPU."""
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    called: list[str] = []
    batch = batch_of([5, 6, 7])

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        called.extend(str(node.target) for node in module.graph.nodes if "varlen" in str(node.target))
        return lambda *_: (torch.ones(Bucket.even(batch).pairs),)

    with torch.compiler.set_stance(force_backend=backend):
        scorer = SCORERS["compiled, eager"](folded(tiny), tiny.shape, varlen_attn, device="cpu")
        assert scorer(batch).tolist() == [1.0] * 3
    assert len(called) == tiny.shape.num_layers


# What is refused, and what needs a GPU.


def test_missing_triton_is_said(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ettin.gpu.engines.triton_steps", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependency, match="kernels='triton' needs triton, which is not installed"):
        SCORERS["triton, eager"](folded(tiny), tiny.shape, varlen, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCORERS)
def test_scores_on_a_gpu(name: str, demo: Checkpoint) -> None:
    """No farther from float64 than the plain form is, in bf16."""
    from ettin.gpu.engines.flash import flash_kernel

    weights = folded(demo)
    graph = FlashGraph(weights, demo.shape, plain_varlen, torch.float64)
    kernel = flash_kernel()
    errors: dict[str, list[float]] = {"torch, eager": [], name: []}
    scorers = {key: SCORERS[key](weights, demo.shape, kernel) for key in errors}
    for seed in range(3):
        for lengths in LENGTHS:
            batch = batch_of(lengths, seed)
            expected = plain_scores(graph, batch)
            for key, scorer in scorers.items():
                errors[key].extend(np.abs(scorer(batch) - expected))
    assert np.mean(errors[name]) <= 1.2 * np.mean(errors["torch, eager"])
