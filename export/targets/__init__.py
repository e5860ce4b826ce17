"""The targets that a CPU runs.

`pyproject.toml` registers each under its name, see `ettin.artifacts.targets`. Importing this needs no engine
and no torch.
"""

from ettin.artifacts.targets import Component, Target

ONNX = Target(
    name="onnx",
    precisions=("fp32", "fp16", "int8", "bf16"),
    runs_on="ONNX Runtime (CPU, CUDA; bf16: TensorRT-RTX), Optimum, transformers.js",
    shared_precisions=("fp32", "fp16", "int8"),
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
