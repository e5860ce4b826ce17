"""The ONNX file itself, for whoever loads it with something else."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from ettin.artifacts.targets import target_named
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.targets import to_onnx
from ettin.export.writer import rewrite
from ettin.runtimes import load


def feeds() -> dict[str, np.ndarray]:
    ids = np.array([[8188, 5, 8189, 300, 301, 8189], [8188, 5, 8189, 300, 8189, 8190]])
    return {"input_ids": ids, "attention_mask": (ids != 8190).astype(np.int64)}


def test_interface_and_types(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    for precision, stored in (("fp32", onnx.TensorProto.FLOAT), ("fp16", onnx.TensorProto.FLOAT16)):
        folder = demo_artifacts["onnx", precision]
        model = onnx.load(folder / "onnx" / {"fp32": "model.onnx", "fp16": "model_fp16.onnx"}[precision])
        assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask"]
        assert [value.name for value in model.graph.output] == ["logits"]
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        assert types["layers.3.q"] == types["embedding"] == stored
        assert types["head.dense"] == types["head.score"] == onnx.TensorProto.FLOAT


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        yield from (attribute.g for attribute in node.attribute if attribute.HasField("g"))


def kinds(graph: onnx.GraphProto) -> set[str]:
    return {node.op_type for node in graph.node}


def test_no_foreign_operators_and_control_flow_for_global_attention_alone(
    demo_artifacts: dict[tuple[str, str], Path],
) -> None:
    graph = onnx.load(demo_artifacts["onnx", "fp32"] / "onnx" / "model.onnx").graph
    branches = list(subgraphs(graph))
    bodies = [body for branch in branches for body in subgraphs(branch)]
    assert len(branches) == 2 * 2 and len(bodies) == 2  # layers 0 and 3; the last one has a single query for each pair
    assert kinds(graph) & {"If", "Loop", "Scan"} == {"If"}
    assert {node.domain for part in (graph, *branches, *bodies) for node in part.node} == {""}
    assert sorted("Loop" in kinds(branch) for branch in branches) == [False, False, True, True]
    assert all(kinds(body) == {"Gather", "Identity", "Transpose", "MatMul", "Add", "Softmax"} for body in bodies)


@pytest.mark.parametrize("tokens", [256, 257, 1000])
def test_scores_of_a_long_input_are_computed_by_blocks(
    demo: Checkpoint, demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, tokens: int
) -> None:
    """Up to the block threshold the dense branch runs, over it the one with Loop."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    path = demo_artifacts["onnx", "fp32"] / "onnx" / "model.onnx"
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.full((1, tokens), 5)
    session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    events = json.loads(Path(session.end_profiling()).read_text())
    softmax = [event["args"] for event in events if event.get("args", {}).get("op_name") == "Softmax"]
    largest = max(int(args["output_size"]) for args in softmax)
    heads, padded = demo.shape.num_heads, -(-tokens // 64) * 64
    assert (largest == heads * tokens * tokens * 4) == (tokens <= 256)
    assert tokens <= 256 or largest <= heads * padded * 192 * 4  # local layers: each query sees 192 keys at most


@pytest.mark.parametrize("tokens", [100, 300])
def test_openvino_reads_both_branches(demo_artifacts: dict[tuple[str, str], Path], tokens: int) -> None:
    """Another engine's reader of ONNX files; version 2026.4 refuses a Scan whose body uses outer values."""
    import openvino

    path = demo_artifacts["onnx", "fp32"] / "onnx" / "model.onnx"
    ids = np.random.default_rng(tokens).integers(0, 8187, (2, tokens))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    np.testing.assert_allclose(compiled(inputs)[0], expected, atol=1e-4)


def test_last_layer_computes_one_query(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """The point of the rewriting: its MLP sees one token, the layer before sees all."""
    model = onnx.load(demo_artifacts["onnx", "fp32"] / "onnx" / "model.onnx")
    for layer in (5, 6):
        product = next(node for node in model.graph.node if f"layers.{layer}.up" in node.input)
        model.graph.output.append(onnx.helper.make_tensor_value_info(product.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.shape for output in session.run(None, feeds())] == [(2, 1), (2, 6, 192), (2, 1, 192)]


def test_external_data_moves_with_its_folder(demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "EXTERNAL_FROM_BYTES", 1 << 20)
    first = tmp_path / "first"
    first.mkdir()
    lowered = to_onnx.OnnxWriter(target_named("onnx")).write(rewrite(demo), "fp32", first)
    files = {path.name: path.stat().st_size for path in (first / "onnx").iterdir()}
    assert files["model.onnx_data"] > 8e6 and files["model.onnx"] < 1e6
    moved = shutil.move(first, tmp_path / "moved")
    session = ort.InferenceSession(str(Path(moved) / lowered.entry), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(["logits"], feeds())[0]).all()


def test_equal_rotary_tables_are_stored_once(demo: Checkpoint) -> None:
    """At 7,999 tokens each is 2 MB in float32."""
    for theta, kinds_of_layers in ((demo.shape.rope_theta_global, ["global"]), (10_000.0, ["global", "local"])):
        checkpoint = replace(demo, shape=replace(demo.shape, rope_theta_local=theta))
        names = sorted(name for name in rewrite(checkpoint).weights if name.startswith("rope."))
        assert names == [f"rope.{kind}.{part}" for kind in kinds_of_layers for part in ("cos", "sin")]


def test_configs_for_other_loaders(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    for target in ("onnx", "openvino", "transformers"):
        folder = demo_artifacts[target, "fp32"]
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["ModernBertForSequenceClassification"]
        assert config["global_rope_theta"] == config["local_rope_theta"] == 160000.0
        assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 160000.0
        assert config["sentence_transformers"]["activation_fn"] == "torch.nn.modules.linear.Identity"
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        special = json.loads((folder / "special_tokens_map.json").read_text())
        assert special == {
            "cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]", "sep_token": "[SEP]",
            "unk_token": "[UNK]",
        }  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_transformers_artifact_is_a_cross_encoder(demo_artifacts: dict[tuple[str, str], Path], precision: str) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    pairs = [("red planet", "Mars is red"), ("red planet", "bread"), ("", "")]
    folder = demo_artifacts["transformers", precision]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    stock = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": dtype, "attn_implementation": "sdpa"})
    with load(folder) as runtime:
        scores = runtime.predict(pairs)
    tolerance = 1e-5 if precision == "fp32" else 0.07  # bf16 steps at 8 are 0.0625, and batches differ
    np.testing.assert_allclose(stock.predict([list(pair) for pair in pairs]), scores, atol=tolerance)


def test_transformers_artifact_equals_the_modular_checkpoint(
    demo_artifacts: dict[tuple[str, str], Path], demo_gold: object
) -> None:
    from sentence_transformers import CrossEncoder

    pairs = [["red planet", "Mars is red"], ["red planet", "bread " * 300], ["", ""]]
    stock = CrossEncoder(str(demo_artifacts["transformers", "fp32"]), device="cpu")
    assert isinstance(demo_gold, CrossEncoder)
    np.testing.assert_allclose(stock.predict(pairs), demo_gold.predict(pairs), atol=1e-4)
