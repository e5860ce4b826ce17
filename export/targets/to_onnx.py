"""Checkpoint → ONNX, in the folder layout that Optimum and transformers.js expect."""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ettin.artifacts.manifest import Interface, Needs
from ettin.artifacts.targets import Target
from ettin.export.options import BuildOptions
from ettin.export.targets.onnx_ops import OPSET, Int8OnnxOps, OnnxOps, Value
from ettin.export.targets.to_transformers import write_configs
from ettin.export.writer import ISA, PACKED, PADDED, Lowered, Model, Writer
from ettin.graph import GraphForm, Scorer
from ettin.graph.packed import PackedScorer
from ettin.runtimes.machine import installed_version

_COMPUTE = {"fp32": "float32", "fp16": "float16"}
# transformers.js finds a precision by its file name; Optimum takes the one ONNX file that there is.
_FILE = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
_IR_VERSION = 9  # what ONNX Runtime 1.17 reads, the first with opset 20
EXTERNAL_FROM_BYTES = 1 << 30


class OnnxWriter(Writer):
    """Writes `onnx/model.onnx` and the configs beside it.

    "fp16" has norms and head in fp32; "int8" has everything but the linear layers in fp32.

    Args:
        target: the target.
        build: must be None or the default: nothing is compiled.
        form: speed choices.
        external_from_bytes: weights of this size and more go to `model.onnx_data`: protobuf ends at 2 GiB.
    """

    def __init__(
        self,
        target: Target,
        build: BuildOptions | None = None,
        *,
        form: GraphForm | None = None,
        external_from_bytes: int = EXTERNAL_FROM_BYTES,
    ) -> None:
        super().__init__(target, build)
        self._form, self._external_from_bytes = form or GraphForm(), external_from_bytes

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        ops = Int8OnnxOps(model.quantised) if model.quantised else OnnxOps(model.arrays(), _COMPUTE[precision])
        scorer = Scorer(ops, model.checkpoint.shape, self._form)
        logits = scorer.logits(Value("input_ids", "int64"), Value("attention_mask", "int64"))
        path = folder / "onnx" / _FILE[precision]
        save(ops, logits, PADDED, path, self._external_from_bytes)
        write_configs(model.checkpoint, folder)
        return onnx_lowered(path, folder, PADDED, precision, self._form)


def onnx_lowered(path: Path, folder: Path, interface: Interface, precision: str, form: GraphForm) -> Lowered:
    """What a manifest says of an ONNX file at `path` in an artifact's `folder`."""
    version = installed_version("onnxruntime")
    return Lowered(
        entry=path.relative_to(folder).as_posix(),
        interface=interface,
        needs=Needs(device="any", isa=ISA.get(precision, ()), package="onnxruntime", version=version),
        graph=asdict(form),
    )


def packed_onnx(model: Model, compute: str, path: Path, *, external_from_bytes: int = EXTERNAL_FROM_BYTES) -> GraphForm:
    """Writes the packed graph, whose element types are all in the file: what a strongly typed engine is built from.

    Args:
        model: what is lowered.
        compute: "float32" or "bfloat16", see `OnnxOps`.
        path: the file; its folder is made.
        external_from_bytes: see `OnnxWriter`.
    """
    ops, form = OnnxOps(model.arrays(), compute), GraphForm()
    inputs = [Value(each.name, each.dtype) for each in PACKED.inputs]
    logits = PackedScorer(ops, model.checkpoint.shape, form).packed_logits(*inputs)
    save(ops, logits, PACKED, path, external_from_bytes)
    return form


def save(ops: OnnxOps, logits: Value, interface: Interface, path: Path, external_from_bytes: int) -> None:
    """Writes a checked model; takes the weights out of `ops`."""
    ops.nodes.append(helper.make_node("Identity", [logits.name], ["logits"], "logits"))
    inputs = [helper.make_tensor_value_info(each.name, TensorProto.INT64, each.shape) for each in interface.inputs]
    outputs = [helper.make_tensor_value_info(each.name, TensorProto.FLOAT, each.shape) for each in interface.outputs]
    model = helper.make_model(
        helper.make_graph(ops.nodes, "ettin-reranker", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="ettin-export",
        producer_version=importlib.metadata.version("ettin-export"),
    )
    size_bytes = sum(len(each.raw_data) for each in ops.initializers.values())
    external = size_bytes >= external_from_bytes
    for name in list(ops.initializers):  # protobuf copies: one weight at a time is there twice, not all
        model.graph.initializer.append(ops.initializers.pop(name))
    path.parent.mkdir(exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}_data", size_threshold=1024)
    onnx.checker.check_model(path, full_check=True)
