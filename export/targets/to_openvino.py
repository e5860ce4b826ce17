"""Checkpoint → OpenVINO IR for CPUs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset15 as op

from ettin.artifacts.manifest import Interface, Needs
from ettin.artifacts.targets import Target
from ettin.export.options import BuildOptions
from ettin.export.targets.openvino_ops import Int8OpenVinoOps, OpenVinoOps
from ettin.export.writer import ISA, PADDED, RAGGED, Lowered, Model, Writer
from ettin.graph import GraphForm, Scorer
from ettin.graph.packed import RaggedScorer
from ettin.runtimes.engines.openvino_kernels import HEAD_DIM, RAGGED_NAME, SWITCH, compiled, kernels
from ettin.runtimes.machine import has_bf16

# Both GeGLU halves in one product: as two, OpenVINO 2026.4.1 fuses them into an LLMMLP node in bf16, which dies with
# SIGFPE on one thread per stream and is no faster elsewhere.
# Local layers pay for blocks from about 500 tokens on (17m shape, AMX; from 250 on with AVX2-VNNI): up to there the
# runtime leaves out all that serves them.
FORM = GraphForm(block_threshold_tokens=512, split_geglu=False, rotate_blocks=True)


class OpenVinoWriter(Writer):
    """Writes `openvino/openvino_model.xml` and `.bin`.

    Weights are stored as "fp32" or "bf16", or for "int8" the linear layers in int8 and the rest in bf16. Anything but
    int8 products is written as float32: the runtime's hint decides the arithmetic.

    Args:
        target: the target.
        build: must be None or the default: nothing is compiled.
        form: speed choices.
    """

    def __init__(self, target: Target, build: BuildOptions | None = None, *, form: GraphForm = FORM) -> None:
        super().__init__(target, build)
        self._form = form

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        shape, new_ops = model.checkpoint.shape, _ops(model, precision)
        path = folder / "openvino" / "openvino_model.xml"
        path.parent.mkdir()
        _write(Scorer(new_ops(), shape, self._form).logits, PADDED, path)
        is_ragged = precision != "fp32" and shape.head_dim == HEAD_DIM and compiled() is not None
        if is_ragged:
            _write(RaggedScorer(new_ops(), shape, self._form).ragged_logits, RAGGED, path.with_name(RAGGED_NAME))
            share_weights(path.with_name(RAGGED_NAME), path)
        version = ov.__version__.split("-")[0]
        return Lowered(
            entry=path.relative_to(folder).as_posix(),
            interface=PADDED,
            needs=Needs(device="cpu", isa=ISA.get(precision, ()), package="openvino", version=version),
            graph={**asdict(self._form), "ragged": is_ragged},
        )

    def environments(self, precision: str) -> Iterator[Mapping[str, str]]:
        if precision == "fp32":
            return
        if kernels():
            yield {SWITCH: "off"}
        if has_bf16():  # without it OpenVINO computes with a bf16 artifact's weights in f32
            yield {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}


def _ops(model: Model, precision: str) -> Callable[[], OpenVinoOps]:
    """Makes the operations of one graph. All graphs of an artifact share their weights."""
    if model.quantised:
        return partial(Int8OpenVinoOps, model.quantised, _bf16_constant)
    return partial(OpenVinoOps, model.arrays(), _bf16_constant if precision == "bf16" else op.constant)


def _write(described: Callable[..., ov.Node], interface: Interface, path: Path) -> None:
    """Writes a graph, and lets go of it: the next has constants of its own."""
    inputs = [op.parameter([-1] * len(each.shape), ov.Type.i64, name=each.name) for each in interface.inputs]
    logits = described(*inputs)
    for node, spec in zip((*inputs, logits), (*interface.inputs, *interface.outputs), strict=True):
        node.output(0).get_tensor().set_names({spec.name})
    # save_model stores weights as fp16 unless told otherwise.
    ov.save_model(ov.Model([logits], inputs, "ettin-reranker"), path, compress_to_fp16=False)


def share_weights(path: Path, with_path: Path) -> None:
    """Makes an IR read its constants from another's `.bin`; its own is removed.

    Args:
        path: the IR; what the other lacks is added to the other's `.bin`.
        with_path: the other.
    """
    own, other = path.with_suffix(".bin"), with_path.with_suffix(".bin")
    theirs = other.read_bytes()
    places = {_digest(theirs, data): int(data.attrib["offset"]) for data in _constants(_parsed(with_path))}
    del theirs
    tree, ours = _parsed(path), own.read_bytes()
    with other.open("ab") as file:
        for data in _constants(tree):
            digest = _digest(ours, data)
            if digest not in places:
                file.write(b"\0" * (-file.tell() % 64))
                places[digest] = file.tell()
                start = int(data.attrib["offset"])
                file.write(ours[start : start + int(data.attrib["size"])])
            data.attrib["offset"] = str(places[digest])
    tree.write(path, encoding="utf-8", xml_declaration=True)
    own.unlink()


def _parsed(path: Path) -> "ElementTree.ElementTree[ElementTree.Element]":
    return ElementTree.parse(path)  # noqa: S314 (written a moment ago, by OpenVINO)


def _constants(tree: "ElementTree.ElementTree[ElementTree.Element]") -> list[ElementTree.Element]:
    return tree.findall("./layers/layer[@type='Const']/data")


def _digest(binary: bytes, data: ElementTree.Element) -> bytes:
    start = int(data.attrib["offset"])
    return hashlib.sha256(memoryview(binary)[start : start + int(data.attrib["size"])]).digest()


def _bf16_constant(values: NDArray[np.float32]) -> ov.Node:
    """A bf16 constant, converted to float32 when the model is compiled.

    Rounded to nearest here, since OpenVINO's own conversion (2026.4.1) does not: its error is twice as large.
    """
    rounded = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    return op.convert(op.constant(rounded, ov.Type.bf16), "f32")
