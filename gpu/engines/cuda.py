"""The few CUDA calls that an engine needs, without torch: memory, one stream, graphs."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from ettin.artifacts.errors import HardwareError


class Stream:
    """A CUDA stream with the memory that is used on it. Not safe to use from two threads at once."""

    def __init__(self) -> None:
        self._stream = _checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._device: list[int] = []
        self._pinned: list[int] = []

    @property
    def handle(self) -> int:
        """The stream's address, as engines take it."""
        return int(self._stream)

    def device_bytes(self, size_bytes: int) -> int:
        """Address of new device memory, zeroed."""
        address = int(_checked(cudart.cudaMalloc(size_bytes)))
        self._device.append(address)
        _checked(cudart.cudaMemsetAsync(address, 0, size_bytes, self._stream))
        return address

    def pinned(self, count: int, dtype: Any) -> NDArray[Any]:
        """A new array [count] in page-locked host memory, which the device copies from without the CPU."""
        size_bytes = count * np.dtype(dtype).itemsize
        address = int(_checked(cudart.cudaHostAlloc(size_bytes, 0)))
        self._pinned.append(address)
        memory = (ctypes.c_byte * size_bytes).from_address(address)
        return np.asarray(memory).view(dtype)

    def to_device(self, address: int, host: NDArray[Any]) -> None:
        """Queues a copy of all of `host`."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        _checked(cudart.cudaMemcpyAsync(address, host.ctypes.data, host.nbytes, kind, self._stream))

    def to_host(self, host: NDArray[Any], address: int) -> None:
        """Queues a copy that fills `host`."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _checked(cudart.cudaMemcpyAsync(host.ctypes.data, address, host.nbytes, kind, self._stream))

    def wait(self) -> None:
        """Waits until everything that was queued is done."""
        _checked(cudart.cudaStreamSynchronize(self._stream))

    def recorded(self, work: Callable[[], None]) -> "CudaGraph":
        """Records what `work` queues as one CUDA graph, without running it."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        finally:
            graph = _checked(cudart.cudaStreamEndCapture(self._stream))
        ready = _checked(cudart.cudaGraphInstantiate(graph, 0))
        _checked(cudart.cudaGraphDestroy(graph))
        return CudaGraph(ready, self._stream)

    def close(self) -> None:
        """Frees everything; arrays from `pinned` must not be used any more."""
        for address in self._device:
            _checked(cudart.cudaFree(address))
        for address in self._pinned:
            _checked(cudart.cudaFreeHost(address))
        self._device, self._pinned = [], []
        _checked(cudart.cudaStreamDestroy(self._stream))


class CudaGraph:
    """A recorded sequence of copies and kernels."""

    def __init__(self, ready: Any, stream: Any) -> None:
        self._ready, self._stream = ready, stream

    def launch(self) -> None:
        """Queues all of it at once."""
        _checked(cudart.cudaGraphLaunch(self._ready, self._stream))

    def close(self) -> None:
        """Frees it."""
        _checked(cudart.cudaGraphExecDestroy(self._ready))


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call; raises `HardwareError` if it failed."""
    code, *values = result
    if int(code) != 0:
        _, text = cudart.cudaGetErrorString(code)
        raise HardwareError(f"CUDA: {text.decode()} ({code.name}). Look at: nvidia-smi")
    return values[0] if values else None
