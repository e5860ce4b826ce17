"""Checkpoint → ONNX, in the folder layout that Optimum and transformers.js expect."""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ettin.artifacts.errors import HardwareError
from ettin.artifacts.manifest import Interface, Needs
from ettin.export.targets.onnx_ops import OPSET, Int8OnnxOps, OnnxOps, Value
from ettin.export.targets.to_transformers import write_configs
from ettin.export.writer import ISA, PACKED, PADDED, Lowered, Model, Writer
from ettin.graph import GraphForm, Scorer
from ettin.graph.packed import PackedScorer
from ettin.runtimes.machine import installed_version

FORM = GraphForm()
_COMPUTE = {"fp32": "float32", "fp16": "float16"}
# transformers.js finds a precision by its file name, and takes "quantized" unless told otherwise.
_FILE = {
    "fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx", "bf16": "model_bf16.onnx",
}  # fmt: skip
_IR_VERSION = 9  # what ONNX Runtime 1.17 reads, the first with opset 20
EXTERNAL_FROM_BYTES = 1 << 30  # larger weights go to `model.onnx_data`: a protobuf file has at most 2 GiB


class OnnxWriter(Writer):
    """Writes `onnx/model.onnx` (`model_fp16.onnx`, `model_quantized.onnx`) and the configs beside it.

    "fp16" has norms and head in fp32; "int8" has everything but the linear layers in fp32. "bf16" is the packed graph
    for TensorRT-RTX, in `model_bf16.onnx`; it has linear layers and attention in bf16, the rest in fp32.
    """

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        path = folder / "onnx" / _FILE[precision]
        if precision == "bf16":
            packed_onnx(model, "bfloat16", path)
            return _lowered(path, folder, PACKED, precision)
        ops = Int8OnnxOps(model.quantised) if model.quantised else OnnxOps(model.arrays(), _COMPUTE[precision])
        scorer = Scorer(ops, model.checkpoint.shape, FORM)
        _save(ops, scorer.logits(*_inputs(PADDED)), PADDED, path)
        write_configs(model.checkpoint, folder)
        return _lowered(path, folder, PADDED, precision)

    def proof(self, precision: str) -> Writer:
        return PackedOnnxWriter(self.target) if precision == "bf16" else self

    def check_runs_here(self, precision: str) -> None:
        super().check_runs_here(precision)
        if precision == "bf16":
            raise HardwareError(
                "ONNX Runtime's CPU provider multiplies no matrices in bf16; onnx bf16 is for a GPU and its device "
                "'trt-rtx'"
            )


class PackedOnnxWriter(Writer):
    """Writes the packed graph as an fp32 artifact: it proves the graph of an engine that can't run here."""

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        path = folder / "onnx" / "model.onnx"
        packed_onnx(model, "float32", path)
        return _lowered(path, folder, PACKED, precision)


def packed_onnx(model: Model, compute: str, path: Path) -> None:
    """Writes the packed graph. The file states all element types, so a strongly typed engine can be built from it."""
    ops = OnnxOps(model.arrays(), compute)
    scorer = PackedScorer(ops, model.checkpoint.shape, FORM)
    _save(ops, scorer.packed_logits(*_inputs(PACKED)), PACKED, path)


def _inputs(interface: Interface) -> list[Value]:
    return [Value(spec.name, spec.dtype) for spec in interface.inputs]


def _lowered(path: Path, folder: Path, interface: Interface, precision: str) -> Lowered:
    version = installed_version("onnxruntime")
    return Lowered(
        entry=path.relative_to(folder).as_posix(),
        interface=interface,
        needs=Needs(
            device="trt-rtx" if precision == "bf16" else "any",
            isa=ISA.get(precision, ()),
            package="onnxruntime",
            version=version,
        ),
        graph=asdict(FORM),
    )


def _save(ops: OnnxOps, logits: Value, interface: Interface, path: Path) -> None:
    """Writes a checked model; takes the weights out of `ops`."""
    ops.nodes.append(helper.make_node("Identity", [logits.name], ["logits"], "logits"))
    inputs = [helper.make_tensor_value_info(spec.name, TensorProto.INT64, spec.shape) for spec in interface.inputs]
    outputs = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in interface.outputs]
    model = helper.make_model(
        helper.make_graph(ops.nodes, "ettin-reranker", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="ettin-export",
        producer_version=importlib.metadata.version("ettin-export"),
    )
    is_external = sum(len(tensor.raw_data) for tensor in ops.initializers.values()) >= EXTERNAL_FROM_BYTES
    for name in list(ops.initializers):  # protobuf copies: so only one weight at a time is in memory twice
        model.graph.initializer.append(ops.initializers.pop(name))
    path.parent.mkdir(exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=is_external, location=f"{path.name}_data", size_threshold=1024)
    onnx.checker.check_model(path, full_check=True)
