"""The vocabulary of targets and precisions: the same words in CLI, folders, manifest and code."""

from dataclasses import dataclass

from ettin.artifacts.errors import UsageError


@dataclass(frozen=True)
class Target:
    """One kind of artifact.

    Args:
        name: the word users say.
        precisions: what it can be written in; the first is the default.
        runs_on: one line for lists.
        gpu_only: whether it needs a GPU to run.
    """

    name: str
    precisions: tuple[str, ...]
    runs_on: str
    gpu_only: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("onnx", ("fp32", "fp16", "int8"), "ONNX Runtime (CPU, CUDA), Optimum, transformers.js"),
        Target("openvino", ("int8", "bf16", "fp32"), "Intel and AMD CPUs"),
        Target("trt", ("bf16",), "NVIDIA GPUs: TensorRT, Triton", gpu_only=True),
        Target("trt-rtx", ("bf16",), "NVIDIA GPUs: TensorRT-RTX, built with or without one", gpu_only=True),
        Target("transformers", ("fp32", "bf16"), "PyTorch; servers that load ModernBertForSequenceClassification"),
    )
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: no such target; lists the valid ones.
    """
    if name not in TARGETS:
        raise UsageError(f"unknown target '{name}', expected one of: {', '.join(TARGETS)}")
    return TARGETS[name]


def checked_precision(target: Target, precision: str | None) -> str:
    """`precision`, or the target's default for None.

    Raises:
        UsageError: the target has no such precision; lists those it has.
    """
    if precision is None:
        return target.precisions[0]
    if precision not in target.precisions:
        valid = ", ".join(target.precisions)
        raise UsageError(f"target '{target.name}' has no precision '{precision}', expected one of: {valid}")
    return precision
