"""The targets of this project. `pyproject.toml` registers each under its name, see `ettin.artifacts.targets`.

Importing this needs no engine and no torch.
"""

from ettin.artifacts.targets import Component, Target

ONNX = Target(
    name="onnx",
    precisions=("fp32", "fp16", "int8"),
    runs_on="ONNX Runtime (CPU, CUDA), Optimum, transformers.js",
    shares_folder=True,
    runtime=Component("ettin.runtimes.engines.on_onnxruntime:OnnxRuntime", ("onnxruntime",), "onnx"),
    writer=Component("ettin.export.targets.to_onnx:OnnxWriter", ("onnx",), "export"),
    triton_backends=("python", "onnxruntime"),
)

OPENVINO = Target(
    name="openvino",
    precisions=("int8", "bf16", "fp32"),
    runs_on="Intel and AMD CPUs",
    runtime=Component("ettin.runtimes.engines.on_openvino:OpenVinoRuntime", ("openvino",), "openvino"),
    writer=Component("ettin.export.targets.to_openvino:OpenVinoWriter", ("openvino", "openvino_tokenizers"), "export"),
    triton_backends=("python", "openvino"),
)

TRANSFORMERS = Target(
    name="transformers",
    precisions=("fp32", "bf16"),
    runs_on="PyTorch; servers that load ModernBertForSequenceClassification",
    runtime=Component("ettin.runtimes.engines.on_torch:TorchRuntime", ("torch", "transformers"), "torch"),
    writer=Component(
        "ettin.export.targets.to_transformers:TransformersWriter", ("safetensors", "transformers"), "export"
    ),
    triton_backends=(),  # torch has no place in a server that runs without it
)

_TENSORRT_WRITER = Component("ettin.gpu.targets.to_tensorrt:TensorRtWriter", ("onnx",), "export")

TRT = Target(
    name="trt",
    precisions=("bf16",),
    runs_on="NVIDIA GPUs: TensorRT, Triton",
    is_compiled=True,
    runtime=Component("ettin.gpu.engines.on_tensorrt:TensorRtRuntime", ("tensorrt", "cuda.bindings"), "trt"),
    writer=_TENSORRT_WRITER,
    triton_backends=("python", "tensorrt"),
)

TRT_RTX = Target(
    name="trt-rtx",
    precisions=("bf16",),
    runs_on="NVIDIA GPUs: TensorRT-RTX, built with or without one",
    is_compiled=True,
    runtime=Component("ettin.gpu.engines.on_tensorrt:TensorRtRuntime", ("tensorrt_rtx", "cuda.bindings"), "trt-rtx"),
    writer=_TENSORRT_WRITER,
)
