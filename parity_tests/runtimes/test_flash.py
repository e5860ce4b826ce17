"""The FlashAttention-2 paths on a CPU, with a stand-in for the kernel."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import PLAIN
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.parity import read_parity
from ettin.artifacts.tolerances import REWRITE_FLOAT64
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import read_weights
from ettin.gpu.visit.models import plain_varlen
from ettin.graph.fold import inference_weights
from ettin.graph.torch_ops import InferenceGraph
from ettin.runtimes import load
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines import flash
from ettin.runtimes.engines.flash import FlashGraph
from ettin.runtimes.engines.on_torch import TorchRuntime

WINDOWS: list[tuple[int, int]] = []
DEMO_WINDOWS = [(-1, -1), (64, 64), (64, 64), (-1, -1), (64, 64), (64, 64), (-1, -1)]


def watched_varlen(*arguments: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    """The stand-in, with what the real kernel demands."""
    q, k, v, cu_q, cu_k = arguments[:5]
    assert q.ndim == k.ndim == 3 and cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert q.dtype == k.dtype == v.dtype
    WINDOWS.append(window_size)
    return plain_varlen(*arguments, window_size=window_size, **options)


def batch_of(lengths: Sequence[int]) -> Batch:
    generator = np.random.default_rng(sum(lengths))
    return Batch.of([generator.integers(0, 8000, length).astype(np.int32) for length in lengths], 0)


# The reference: transformers' stock model on the kernel.


def test_reference_equals_gold(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    artifact = demo_artifacts["transformers", "fp32"]
    model = AutoModelForSequenceClassification.from_pretrained(artifact, dtype=torch.float32).eval()
    flash.use_flash(model, watched_varlen)
    WINDOWS.clear()
    cases = [case for case in read_parity(artifact) if len(case.ids) <= 300][::3]
    assert max(len(case.ids) for case in cases) > 130
    with torch.inference_mode():
        for start in range(0, len(cases), 32):
            chosen = cases[start : start + 32]
            batch = Batch.of([np.array(case.ids, np.int32) for case in chosen], 0)
            logits = flash.flash_logits(model, batch, "cpu")
            np.testing.assert_allclose(logits, [case.gold for case in chosen], atol=1e-4, rtol=1e-4)
    assert WINDOWS[:7] == DEMO_WINDOWS


def test_reference_pools_the_mean(plain: Callable[[str], Checkpoint]) -> None:
    folder = plain("biased mean").folder
    stock, model = (AutoModelForSequenceClassification.from_pretrained(folder).eval() for _ in range(2))
    flash.use_flash(model, watched_varlen)
    batch = batch_of([5, 90, 300])
    with torch.inference_mode():
        input_ids, attention_mask = (torch.from_numpy(array) for array in batch.padded())
        expected = stock(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
        np.testing.assert_allclose(flash.flash_logits(model, batch, "cpu"), expected, atol=1e-4, rtol=1e-4)


# Our graph on the kernel.


@pytest.mark.parametrize("which", ["demo", "tiny", "biased cls", "biased mean"])
def test_graph_equals_one_by_one_in_float64(
    which: str, request: pytest.FixtureRequest, plain: Callable[[str], Checkpoint]
) -> None:
    checkpoint: Checkpoint = plain(which) if which in PLAIN else request.getfixturevalue(which)
    tensors = read_weights(checkpoint)
    weights = inference_weights(tensors.encoder, tensors.head, checkpoint.shape, torch.float64)
    single = InferenceGraph(weights, checkpoint.shape)
    graph = FlashGraph(weights, checkpoint.shape, watched_varlen, torch.float64)
    for lengths in ([1], [3, 1], [63, 64, 65, 66], [127, 1, 128, 129], [5, 700, 8, 257]):
        batch = batch_of(lengths)
        with torch.inference_mode():
            found = graph(*flash.packed_inputs(batch, "cpu"), batch.longest)
        rows = torch.from_numpy(batch.ids).long().split(lengths)
        expected = torch.cat([single(row[None], torch.ones_like(row)[None]) for row in rows])[:, 0]
        assert float(((found - expected).abs() / expected.abs().clamp(min=1)).max()) <= REWRITE_FLOAT64, lengths


def staying(move: Callable[..., Any]) -> Callable[..., Any]:
    """Without `.to("cuda")`."""

    def moved(self: Any, *arguments: Any, **options: Any) -> Any:
        return self if arguments[:1] == ("cuda",) else move(self, *arguments, **options)

    return moved


def test_runtime_uses_the_graph_on_a_gpu(
    demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a CPU in the GPU's place: everything but the device's name is what runs there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ettin.runtimes.engines.on_torch.flash_kernel", lambda: watched_varlen)
    for kind in (torch.nn.Module, Tensor):
        monkeypatch.setattr(kind, "to", staying(kind.to))
    WINDOWS.clear()
    artifact = demo_artifacts["transformers", "bf16"]
    cases = [case for case in read_parity(artifact) if len(case.ids) <= 200 < case.max_length]
    with load(artifact, device="cuda") as runtime:
        assert isinstance(runtime, TorchRuntime) and "cuda, FlashAttention-2, unpadded, bf16" in runtime.description
        found = runtime.predict([(case.query, case.document) for case in cases])
    # Two batches at a time, so their layers mix.
    assert len(WINDOWS) % 7 == 0 and 3 * WINDOWS.count((64, 64)) == 4 * WINDOWS.count((-1, -1)) > 0
    gold = np.array([case.gold for case in cases])
    low = np.array([case.torch_bf16 for case in cases], np.float64)
    assert 0 < np.abs(found - gold).mean() <= 1.5 * np.abs(low - gold).mean()


# What is refused.


def test_no_gpu_is_said(demo_artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError, match="torch finds no"):
        flash.flash_kernel()
    with pytest.raises(HardwareError, match="device 'cuda': torch finds no CUDA device"):
        load(demo_artifacts["transformers", "bf16"], device="cuda")


def test_old_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(HardwareError, match="needs sm_80 or later, Tesla T4 is sm_75"):
        flash.flash_kernel()


def test_kernel_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    from torch.nn.attention.varlen import varlen_attn

    assert flash.flash_kernel() is varlen_attn
