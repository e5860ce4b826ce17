"""Checkpoint → OpenVINO IR for CPUs."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset15 as op

from ettin.artifacts.manifest import Needs
from ettin.export.lowering import ISA, PADDED, Lowered, Material
from ettin.export.openvino_graph import OpenVinoOps
from ettin.export.openvino_int8 import Int8OpenVinoOps
from ettin.runtimes.graph import GraphForm, Scorer

# Both GeGLU halves in one product: as two, OpenVINO 2026.4.1 fuses them into an LLMMLP node in bf16, which dies with
# SIGFPE on one thread per stream and is no faster elsewhere.
# Local layers pay for blocks from about 500 tokens on (17m shape, AMX; from 250 on with AVX2-VNNI): up to there the
# runtime leaves out all that serves them.
FORM = GraphForm(block_threshold_tokens=512, split_geglu=False)


def openvino_from_checkpoint(material: Material, precision: str, folder: Path, *, form: GraphForm = FORM) -> Lowered:
    """Writes `openvino/openvino_model.xml` and `.bin`.

    Args:
        material: what is lowered.
        precision: type that weights are stored in, "fp32" or "bf16"; or "int8" for the linear layers, with the rest in
            bf16. Anything but int8 products is written as float32: the runtime's hint decides the arithmetic.
        folder: where to.
        form: speed choices.
    """
    if material.quantised:
        ops: OpenVinoOps = Int8OpenVinoOps(material.quantised, _bf16_constant)
    else:
        ops = OpenVinoOps(material.folded(), _bf16_constant if precision == "bf16" else op.constant)
    inputs = [op.parameter([-1, -1], ov.Type.i64, name=each.name) for each in PADDED.inputs]
    logits = Scorer(ops, material.checkpoint.shape, form).logits(*inputs)
    for node, spec in zip((*inputs, logits), (*PADDED.inputs, *PADDED.outputs), strict=True):
        node.output(0).get_tensor().set_names({spec.name})
    model = ov.Model([logits], inputs, "ettin-reranker")
    path = folder / "openvino" / "openvino_model.xml"
    path.parent.mkdir()
    # save_model stores weights as fp16 unless told otherwise.
    ov.save_model(model, path, compress_to_fp16=False)
    version = ov.__version__.split("-")[0]
    return Lowered(
        entry=path.relative_to(folder).as_posix(),
        interface=PADDED,
        needs=Needs(device="cpu", isa=ISA.get(precision, ()), package="openvino", version=version),
        graph=asdict(form),
    )


def _bf16_constant(values: NDArray[np.float32]) -> ov.Node:
    """A bf16 constant, converted to float32 when the model is compiled.

    Rounded to nearest here, since OpenVINO's own conversion (2026.4.1) does not: its error is twice as large.
    """
    rounded = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    return op.convert(op.constant(rounded, ov.Type.bf16), "f32")
