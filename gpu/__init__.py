"""Everything that needs an NVIDIA GPU: engines, writers of engine files, and the visit that measures a card.

Here are the descriptions of the targets and devices. `pyproject.toml` registers each under its name, as a package from
elsewhere would (see `ettin.artifacts.targets`); nothing below imports this package. `marks.py` says which of it a card
has run. Importing this needs no engine and no torch.
"""

from ettin.artifacts.targets import Component, Target
from ettin.gpu.marks import mark

_TENSORRT = "ettin.gpu.engines.on_tensorrt:TensorRtRuntime"
_TENSORRT_WRITER = Component("ettin.gpu.targets.to_tensorrt:TensorRtWriter", ("onnx",), "export")

TRT = Target(
    name="trt",
    precisions=("bf16",),
    runs_on="NVIDIA GPUs: TensorRT, Triton",
    runtime=Component(_TENSORRT, ("tensorrt", "cuda.bindings"), "trt", experimental=mark("trt")),
    writer=_TENSORRT_WRITER,
    device="cuda",
    is_compiled=True,
    triton_backends=("python", "tensorrt"),
)

TRT_RTX = Target(
    name="trt-rtx",
    precisions=("bf16",),
    runs_on="NVIDIA GPUs: TensorRT-RTX, built with or without one",
    runtime=Component(_TENSORRT, ("tensorrt_rtx", "cuda.bindings"), "trt-rtx", experimental=mark("trt-rtx")),
    writer=_TENSORRT_WRITER,
    device="cuda",
    is_compiled=True,
)

ONNX_CUDA = Component(
    "ettin.gpu.engines.onnxruntime_cuda:CudaOnnxRuntime",
    ("onnxruntime",),
    "onnx-gpu",
    experimental=mark("onnx.cuda"),
)

ONNX_TRT_RTX = Component(
    "ettin.gpu.engines.onnxruntime_trt_rtx:TrtRtxOnnxRuntime",
    ("onnxruntime", "onnxruntime_ep_nv_tensorrt_rtx"),
    "onnx-trt-rtx",
    experimental=mark("onnx.trt-rtx"),
)

TRANSFORMERS_CUDA = Component(
    "ettin.gpu.engines.torch_cuda:CudaTorchRuntime",
    ("torch", "transformers"),
    "torch",
    experimental=mark("transformers.cuda"),
)
