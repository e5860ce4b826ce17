"""Checkpoint → OpenVINO IR for CPUs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset15 as op
from transformers import PreTrainedTokenizerFast

from ettin.artifacts.manifest import Interface, Needs
from ettin.export.proof_pairs import natural_pairs
from ettin.export.targets.openvino_ops import Int8OpenVinoOps, OpenVinoOps, save
from ettin.export.targets.to_transformers import write_configs
from ettin.export.writer import ISA, PADDED, RAGGED, Lowered, Model, Writer
from ettin.graph import GraphForm, Scorer
from ettin.graph.packed import RaggedScorer
from ettin.runtimes.engines.openvino_kernels import HEAD_DIMS, RAGGED_NAME, SWITCH, problem, runnable
from ettin.runtimes.machine import has_bf16
from ettin.runtimes.tokenizer import PairTokenizer

# One product for both GeGLU halves: OpenVINO 2026.4.1 fuses two of them into an LLMMLP node in bf16, which dies with
# SIGFPE on one thread per stream and is no faster elsewhere.
# Blocks make local layers faster from about 500 tokens on (17m shape, AMX; from 250 on with AVX2-VNNI): for shorter
# inputs the runtime leaves out all that serves them.
FORM = GraphForm(block_threshold_tokens=512, split_geglu=False, rotate_blocks=True)
_TOKENIZER_NAME = "openvino_tokenizer.xml"  # OpenVINO GenAI looks for it beside the model


class OpenVinoWriter(Writer):
    """Writes `openvino/openvino_model.xml` and `.bin`, and what other programs need besides.

    Weights are stored as "fp32" or "bf16", or for "int8" the linear layers in int8 and the rest in bf16. Anything but
    int8 products is written as float32: the runtime's hint decides the arithmetic.
    """

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        shape, path = model.checkpoint.shape, folder / "openvino" / "openvino_model.xml"
        path.parent.mkdir()
        _write(Scorer(_ops(model, precision), shape, FORM).logits, PADDED, path)
        is_ragged = shape.head_dim in HEAD_DIMS
        if is_ragged:
            ragged_path = path.with_name(RAGGED_NAME)
            _write(RaggedScorer(_ops(model, precision), shape, FORM).ragged_logits, RAGGED, ragged_path)
            share_weights(ragged_path, path)
        write_configs(model.checkpoint, folder)
        problem = _write_tokenizer(folder, model.max_length_tokens, path.with_name(_TOKENIZER_NAME))
        version = ov.__version__.split("-")[0]
        return Lowered(
            entry=path.relative_to(folder).as_posix(),
            interface=PADDED,
            needs=Needs(device="cpu", isa=ISA.get(precision, ()), package="openvino", version=version),
            graph={**asdict(FORM), "ragged": is_ragged},
            notes=(f"OpenVINO GenAI can't open this artifact: {problem}",) if problem else (),
        )

    def environments(self, precision: str) -> Iterator[Mapping[str, str]]:
        # What other machines compute in, with the same weights: without bf16 arithmetic, and without our kernel.
        in_f32 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
        has_kernel = problem() is None
        floats = [{}, in_f32] if precision != "fp32" and has_bf16() else [{}]
        for environment in floats:
            # Without AMX, our kernel computes int8 artifacts in f32 anyway.
            if environment and not (has_kernel and precision == "int8" and runnable()[0].name != "bf16_amx"):
                yield environment
            if has_kernel:
                yield {**environment, SWITCH: "off"}
        if precision == "int8" and has_bf16() and has_kernel:
            yield {SWITCH: "bf16"}  # as with AMX


def _ops(model: Model, precision: str) -> OpenVinoOps:
    if model.quantised:
        return Int8OpenVinoOps(model.quantised, _bf16_constant)
    return OpenVinoOps(model.arrays(), _bf16_constant if precision == "bf16" else op.constant)


def _bf16_constant(values: NDArray[np.float32]) -> ov.Node:
    """A bf16 constant, converted to float32 when the model is compiled.

    It is rounded to nearest here: OpenVINO's own conversion (2026.4.1) is not, and its error is twice as large.
    """
    rounded = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    return op.convert(op.constant(rounded, ov.Type.bf16), "f32")


def _write(logits: Callable[..., ov.Node], interface: Interface, path: Path) -> None:
    """Writes the graph that `logits` describes, and frees it: the next one has constants of its own."""
    inputs = [op.parameter([-1] * len(spec.shape), ov.Type.i64, name=spec.name) for spec in interface.inputs]
    result = logits(*inputs)
    for node, spec in zip((*inputs, result), (*interface.inputs, *interface.outputs), strict=True):
        node.output(0).get_tensor().set_names({spec.name})
    save(ov.Model([result], inputs, "ettin-reranker"), path)


def _write_tokenizer(folder: Path, max_length_tokens: int, path: Path) -> str | None:
    """Writes the tokenizer as a model for OpenVINO GenAI if it gives our ids; otherwise says why not."""
    import openvino_tokenizers  # on use: it changes `ov.Core`

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        converted = openvino_tokenizers.convert_tokenizer(
            tokenizer, number_of_inputs=2, truncation=True, max_length=max_length_tokens
        )
    except Exception as error:  # whatever the library makes of a tokenizer that it does not know
        return f"openvino-tokenizers can't convert the tokenizer ({type(error).__name__}: {str(error)[:200]})"
    compiled = ov.compile_model(converted, "CPU")
    pairs = [(pair.query, pair.document) for pair in natural_pairs()]
    for pair, ids in zip(pairs, PairTokenizer(folder / "tokenizer.json").pairs(pairs, max_length_tokens), strict=True):
        if compiled([np.array([text]) for text in pair])["input_ids"][0].tolist() != ids.tolist():
            return f"its tokenizer gives other ids than the checkpoint's for {pair[0][:60]!r}"
    ov.save_model(converted, path)
    return None


def share_weights(path: Path, with_path: Path) -> None:
    """Makes one IR read its constants from another's `.bin`, which gets those that it lacks, and removes its own."""
    own, shared = path.with_suffix(".bin"), with_path.with_suffix(".bin")
    offsets = {
        hashlib.sha256(values).digest(): int(data.attrib["offset"])
        for data, values in _constants(_parsed(with_path), shared.read_bytes())
    }
    tree = _parsed(path)
    with shared.open("ab") as file:
        for data, values in _constants(tree, own.read_bytes()):
            digest = hashlib.sha256(values).digest()
            if digest not in offsets:
                file.write(b"\0" * (-file.tell() % 64))
                offsets[digest] = file.tell()
                file.write(values)
            data.attrib["offset"] = str(offsets[digest])
    tree.write(path, encoding="utf-8", xml_declaration=True)
    own.unlink()


def _parsed(path: Path) -> "ElementTree.ElementTree[ElementTree.Element]":
    return ElementTree.parse(path)  # noqa: S314 (OpenVINO has just written it)


def _constants(
    tree: "ElementTree.ElementTree[ElementTree.Element]", binary: bytes
) -> Iterator[tuple[ElementTree.Element, memoryview]]:
    """The elements of an IR that describe constants, each with its values."""
    for data in tree.findall("./layers/layer[@type='Const']/data"):
        start = int(data.attrib["offset"])
        yield data, memoryview(binary)[start : start + int(data.attrib["size"])]
