"""Scores batches with `FlashGraph`: who writes its kernels, how they are launched, and the way to the GPU and back.

No GPU has run it. Tests run everything but `CudaCapture` on a CPU, with a stand-in for the attention kernel, and with
torch's tracer in the place of the capture.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ettin.artifacts.errors import MissingDependency
from ettin.gpu.engines.buckets import Bucket
from ettin.gpu.engines.flash import TORCH_STEPS, FlashGraph, Kernel, Steps
from ettin.graph.shape import ModelShape
from ettin.runtimes.batch import Batch

# Takes what computes scores from tensors that stay where they are; returns what computes them again, from what these
# tensors hold then, into the tensor that it returns.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


@dataclass(frozen=True)
class FlashOptions:
    """How `FlashGraph` runs. The default is the plain form, which tests compare all others with.

    Args:
        kernels: who writes those between products and attention: torch has them ("torch"), `TritonSteps` ("triton"), or
            torch.compile ("compiled"), once for all shapes.
        launches: one by one from Python ("eager"), or all of a batch at once ("cuda-graphs"), which needs recurring
            shapes: batches are filled up, and a shape is recorded when it is seen for the second time.
        graph_tokens: larger batches keep a GPU busy for longer than their launches take, and are launched one by one.
        max_graphs: recordings that are kept, those used last; at least 2, because the memory that they share can't be
            used again once the last of them is gone (`create_or_incref_pool` in torch's CUDACachingAllocator.cpp).
    """

    kernels: Literal["torch", "triton", "compiled"] = "torch"
    launches: Literal["eager", "cuda-graphs"] = "eager"
    graph_tokens: int = 16384
    max_graphs: int = 64


class FlashScorer:
    """Scores batches. Re-entrant: threads prepare and wait at the same time, and queue their work one after the other.

    Args:
        weights: what `fold.inference_weights` returns, float32.
        shape: the model's shape.
        kernel: see `use_flash`; for "compiled", one that torch can trace, as `varlen_attn` is.
        options: how it runs.
        device: "cuda", or for trials without a GPU "cpu".
        dtype: see `FlashGraph`.
        capture: None: `CudaCapture`.

    Raises:
        MissingDependency: kernels="triton" without the package triton.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], shape: ModelShape, kernel: Kernel, options: FlashOptions = FlashOptions(),
        *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, capture: Capture | None = None,
    ) -> None:  # fmt: skip
        steps = _triton_steps() if options.kernels == "triton" else TORCH_STEPS
        module = FlashGraph(weights, shape, kernel, dtype, steps).to(device)
        self._is_cuda = module.get_buffer("embedding").is_cuda
        graph: Callable[..., Any] = module
        if options.kernels == "compiled":
            # A part that can't be traced is an error, and so is another shape that none of the compiled forms takes
            # (torch._dynamo.config.recompile_limit, 8); tests see one form.
            graph = torch.compile(graph, dynamic=True, fullgraph=True)
        self._graph, self._options, self._device = graph, options, device
        self._recordings: Recordings | None = None
        if options.launches == "cuda-graphs":
            self._recordings = Recordings(self._launched, capture or CudaCapture(), device, options.max_graphs)
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits, float32 [pairs]."""
        bucket, run = self._way(batch)
        # Pinned memory comes from torch's cache and goes back to it when the GPU has read it, also after an error.
        sent = torch.empty(bucket.size, dtype=torch.int32, pin_memory=self._is_cuda)
        bucket.fill(batch, sent.numpy())
        scores = torch.empty(bucket.pairs, pin_memory=self._is_cuda)
        with self._lock:
            scores.copy_(run(sent, bucket), non_blocking=True)
            done = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
            if done is not None:
                done.record()
        if done is not None:
            done.synchronize()  # the only time that the host waits for the GPU
        return scores[: len(batch)].numpy().copy()

    def _way(self, batch: Batch) -> tuple[Bucket, Callable[[Tensor, Bucket], Tensor]]:
        """What a batch is filled up to, and what takes it."""
        if self._recordings is not None:
            bucket = Bucket.recurring(batch)
            if bucket.tokens <= self._options.graph_tokens:
                return bucket, self._recordings
        bucket = Bucket.even(batch) if self._options.kernels == "compiled" else Bucket.exact(batch)
        return bucket, self._launched

    def _launched(self, buffer: Tensor, bucket: Bucket) -> Tensor:
        """The logits of a filled buffer, on the host or on the device."""
        buffer = buffer.to(self._device, non_blocking=True)
        logits: Tensor = self._graph(*bucket.parts(buffer), bucket.longest)
        return logits


class Recordings:
    """The launches of the buckets that were used last, each recorded at its second use. Not for several threads.

    Args:
        run: computes the logits of a filled buffer.
        capture: records it.
        device: of the recorded inputs.
        most: number of recordings that are kept.
    """

    def __init__(self, run: Callable[[Tensor, Bucket], Tensor], capture: Capture, device: str, most: int) -> None:
        self._run, self._capture, self._device, self._most = run, capture, device, most
        self._seen: set[Bucket] = set()  # a few thousand at most, as `FlashOptions.graph_tokens` bounds all three sizes
        self._kept: OrderedDict[Bucket, tuple[Tensor, Callable[[], Tensor]]] = OrderedDict()

    def __call__(self, buffer: Tensor, bucket: Bucket) -> Tensor:
        """The logits of a filled buffer; those of a recording are overwritten by the next call."""
        if bucket not in self._kept:
            if bucket not in self._seen:
                self._seen.add(bucket)
                return self._run(buffer, bucket)
            self._kept[bucket] = self._recorded(buffer, bucket)
        self._kept.move_to_end(bucket)
        inputs, replay = self._kept[bucket]
        inputs.copy_(buffer, non_blocking=True)
        return replay()

    def _recorded(self, buffer: Tensor, bucket: Bucket) -> tuple[Tensor, Callable[[], Tensor]]:
        inputs = buffer.to(self._device, copy=True)
        if len(self._kept) >= self._most:
            if inputs.is_cuda:
                torch.cuda.synchronize()  # it may be running
            self._kept.popitem(last=False)
        return inputs, self._capture(lambda: self._run(inputs, bucket))


class CudaCapture:
    """Records launches with a CUDA graph. All graphs use one memory pool, so only one may run at a time.

    Source: the notes on CUDA semantics of PyTorch's documentation, and `torch.cuda.graph`. The mode "thread_local"
    allows other threads what a capture forbids, such as waiting for their batches.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # loads kernels and takes workspaces, which a capture can't
        current.wait_stream(self._stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = run()

        def replay() -> Tensor:
            recorded.replay()
            return logits

        return replay


def _triton_steps() -> Steps:
    try:
        from ettin.gpu.engines.triton_steps import TritonSteps
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingDependency("kernels='triton'", "triton", "torch") from None
    return TritonSteps()


# By name: each makes, of (weights, shape, kernel), what scores batches.
SCORERS: dict[str, Callable[..., FlashScorer]] = {
    f"{kernels}, {launches}": partial(FlashScorer, options=FlashOptions(kernels, launches))
    for kernels in ("torch", "triton", "compiled")
    for launches in ("eager", "cuda-graphs")
}
