"""int8: calibration, what is quantised, the gate and its ladder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
import torch

from ettin.artifacts.errors import HardwareError, InputError, ParityError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.parity import read_parity
from ettin.artifacts.tolerances import INT8_NDCG_DROP, INT8_SPEARMAN, int8_rule
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.proof_pairs import proof_pairs
from ettin.export.quantise import LADDER, Quantised, Quantiser, Scheme, calibration_text, group_errors, int8_rows
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.weights import read_weights
from ettin.export.targets.to_onnx import OnnxWriter
from ettin.export.targets.to_openvino import OpenVinoWriter
from ettin.graph.fold import inference_weights
from ettin.graph.ops import ONLY_IN_F32
from ettin.graph.torch_ops import InferenceGraph
from ettin.runtimes import load
from ettin.runtimes import machine as cpu
from ettin.runtimes.engines import on_openvino
from ettin.runtimes.engines.openvino_kernels import SWITCH
from ettin.runtimes.tokenizer import PairTokenizer

LINEARS = {f"layers.{layer}.{name}" for layer in range(7) for name in ("q", "k", "v", "o", "up", "gate", "down")}


@pytest.fixture(scope="module")
def folded(demo: Checkpoint) -> dict[str, torch.Tensor]:
    weights = read_weights(demo)
    return inference_weights(weights.encoder, weights.head, demo.shape)


@pytest.fixture(scope="module")
def quantiser(demo: Checkpoint, folded: dict[str, torch.Tensor]) -> Quantiser:
    sequences = calibration_text().sequences(PairTokenizer(demo.folder / "tokenizer.json"), 1024)
    return Quantiser(folded, demo.shape, sequences)


@pytest.fixture(scope="module")
def calibrated(quantiser: Quantiser) -> Quantised:
    return quantiser.quantised(LADDER[0])


def test_calibration_text_is_not_what_int8_is_judged_on() -> None:
    judged = proof_pairs(ranking=True)
    questions, documents = {pair.query for pair in judged}, " ".join(pair.document for pair in judged)
    text = calibration_text()
    assert len(text.pairs) == 105
    for query, document in text.pairs:
        assert query not in questions and document[:60] not in documents


def test_calibration_lengths_are_spread(demo: Checkpoint) -> None:
    lengths = [len(ids) for ids in calibration_text().sequences(PairTokenizer(demo.folder / "tokenizer.json"), 1024)]
    assert min(lengths) < 64 and max(lengths) > 600 and len(set(lengths)) > 40


def test_users_calibration(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"query": "q", "document": "d"}\n' * 31)
    with pytest.raises(InputError, match="31 pairs, expected at least 32"):
        calibration_text(file)
    file.write_text('{"query": "q", "document": "d"}\n' * 32)
    assert calibration_text(file).name == "mine.jsonl"


def test_smoothing_changes_no_score(demo: Checkpoint, folded: dict[str, torch.Tensor], calibrated: Quantised) -> None:
    ids = torch.randint(0, 8187, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    before = InferenceGraph(folded, demo.shape)(ids, mask)
    after = InferenceGraph(calibrated.weights, demo.shape)(ids, mask)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)
    assert not torch.equal(calibrated.weights["layers.2.down"], folded["layers.2.down"])


def test_ranges_cover_every_linear_layer_and_nothing_else(calibrated: Quantised) -> None:
    assert set(calibrated.input_max) == LINEARS
    assert all(0 < largest < 100 for largest in calibrated.input_max.values())


def test_queries_and_keys_are_of_one_size(calibrated: Quantised) -> None:
    assert set(calibrated.attention_max) == {f"layers.{layer}.o" for layer in range(6)}  # the last one is for CLS only
    for queries, keys in calibrated.attention_max.values():
        assert queries == pytest.approx(keys, rel=1e-4)


@pytest.mark.parametrize("bf16", [True, False])
def test_queries_and_keys_are_rounded_only_in_f32(
    demo_artifacts: dict[tuple[str, str], Path], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_openvino, "has_bf16", lambda: bf16)
    monkeypatch.setenv(SWITCH, "off")
    with load(demo_artifacts["openvino", "int8"]) as runtime:
        assert isinstance(runtime, on_openvino.OpenVinoRuntime)
        for tokens in (64, 600):
            names = [node.get_friendly_name() for node in runtime.model_for(tokens).get_ops()]
            assert sum(name.startswith(ONLY_IN_F32) for name in names) == (0 if bf16 else 12)


def test_ladder_gets_milder(demo: Checkpoint, folded: dict[str, torch.Tensor]) -> None:
    quantiser = Quantiser(folded, demo.shape, [np.arange(40, dtype=np.int32)])
    counts = [len(quantiser.quantised(scheme).input_max) for scheme in LADDER]
    assert counts[0] > counts[1] > counts[2] > len(LINEARS) / 2 and counts[3] == len(LINEARS)
    assert [scheme.activations for scheme in LADDER] == [True, True, True, False]
    assert [scheme.scores for scheme in LADDER] == [True, False, False, False]


def test_the_most_sensitive_layers_stay_in_floating_point(
    demo: Checkpoint, folded: dict[str, torch.Tensor], calibrated: Quantised
) -> None:
    sequences = [np.arange(start, start + 50, dtype=np.int32) for start in range(10, 400, 50)]
    bad = {**calibrated.input_max, "layers.4.o": calibrated.input_max["layers.4.o"] / 50}  # clips nearly all
    errors = group_errors(calibrated.weights, bad, demo.shape, sequences)
    assert len(errors) == 4 * demo.shape.num_layers and max(errors, key=lambda group: errors[group]) == ("layers.4.o",)
    quantiser = Quantiser(folded, demo.shape, sequences)
    mild = quantiser.quantised(LADDER[1])
    errors = group_errors(mild.weights, quantiser.quantised(LADDER[0]).input_max, demo.shape, sequences)
    kept = {name for group in sorted(errors, key=lambda group: errors[group])[-4:] for name in group}
    assert LINEARS - set(mild.input_max) == kept


def test_rows_are_rounded_to_the_nearest_of_255_steps() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    rows, scales = int8_rows(weight)
    assert rows.dtype == torch.int8 and scales.shape == (16, 1) and int(rows.abs().max()) == 127
    assert bool(((rows * scales - weight).abs() <= scales / 2 + 1e-6).all())
    assert not int8_rows(torch.zeros(2, 4))[0].any()


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_gate_is_recorded(demo_artifacts: dict[tuple[str, str], Path], target: str) -> None:
    manifest = Manifest.read(demo_artifacts[target, "int8"])
    assert manifest.calibration is not None and manifest.calibration.scheme == LADDER[0].name
    assert manifest.calibration.text_sha256 == calibration_text().sha256
    quality = manifest.parity.quality
    assert isinstance(quality, dict)
    assert quality["spearman"] >= INT8_SPEARMAN and 0 <= quality["ndcg10_drop"] <= INT8_NDCG_DROP
    assert Manifest.read(demo_artifacts[target, "fp32"]).calibration is None


def test_openvino_stores_and_runs_int8_products(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    folder = demo_artifacts["openvino", "int8"]
    core = ov.Core()
    model = core.read_model(folder / "openvino" / "openvino_model.xml")
    stored = [
        node for node in model.get_ops() if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i8
    ]
    assert len(stored) == len(LINEARS)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [node.get_rt_info()["primitiveType"].astype(str) for node in compiled.get_runtime_model().get_ops()
             if "FullyConnected" in node.get_rt_info()["layerType"].astype(str)]  # fmt: skip
    assert sum("i8" in kind for kind in kinds) == len(LINEARS), kinds
    fp32 = demo_artifacts["openvino", "fp32"] / "openvino" / "openvino_model.bin"
    assert (folder / "openvino" / "openvino_model.bin").stat().st_size < 0.75 * fp32.stat().st_size


def test_onnx_quantises_every_linear_layer(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    model = onnx.load(demo_artifacts["onnx", "int8"] / "onnx" / "model_quantized.onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert all(types[name] == onnx.TensorProto.INT8 for name in LINEARS)
    assert types["head.dense"] == onnx.TensorProto.FLOAT


def judged(scores: Any, gold: Any) -> tuple[bool, dict[str, float]]:
    queries = [f"q{index // 20}" for index in range(len(gold))]
    ok, _, _, figures = int8_rule(scores, gold, queries)
    return ok, figures


def test_the_rule_passes_small_and_fails_large_changes() -> None:
    generator = np.random.default_rng(0)
    gold = generator.normal(0, 4, 400)
    assert judged(gold + generator.normal(0, 0.02, 400), gold)[0]
    ok, figures = judged(gold + generator.normal(0, 3, 400), gold)
    assert not ok and figures["ndcg10_drop"] > INT8_NDCG_DROP and figures["spearman"] < INT8_SPEARMAN
    assert not judged(np.zeros(400), gold)[0]
    assert not judged(-gold, gold)[0]
    assert not judged(np.full(400, np.nan), gold)[0]


@pytest.fixture(scope="module")
def proven_export(demo: Checkpoint) -> Export:
    export = Export(demo, Options(max_length=128), _proven={OpenVinoWriter, OnnxWriter})
    export.prepare([Job("openvino", "int8", Path("unused"))])
    return export


def ruined(schemes: set[str]) -> Any:
    """Quantises with ranges a tenth of what they should be, in the named schemes."""
    quantised = Quantiser.quantised

    def make(self: Quantiser, scheme: Scheme) -> Quantised:
        made = quantised(self, scheme)
        if scheme.name not in schemes:
            return made
        rows = {name: torch.round(tensor * 3) / 3 for name, tensor in made.weights.items() if name in LINEARS}
        ranges = {name: largest / 10 for name, largest in made.input_max.items()}
        return replace(made, weights={**made.weights, **rows}, input_max=ranges)

    return make


@pytest.mark.usefixtures("verified_here")
def test_ladder_is_climbed_and_recorded(proven_export: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Quantiser, "quantised", ruined({LADDER[0].name}))
    assert proven_export.run(Job("openvino", "int8", tmp_path / "artifact"))
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["calibration"]["scheme"] == LADDER[1].name
    assert manifest["calibration"]["float_linears"]


@pytest.mark.usefixtures("verified_here")
def test_nothing_is_published_below_the_limit(
    proven_export: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Quantiser, "quantised", ruined({scheme.name for scheme in LADDER}))
    with pytest.raises(ParityError, match="nDCG@10 drop"):
        proven_export.run(Job("openvino", "int8", tmp_path / "artifact"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("verified_here")
def test_random_weights_have_no_gate(tiny: Checkpoint, tmp_path: Path) -> None:
    export = Export(tiny, Options(max_length=64))
    verification = export.run(Job("openvino", "int8", tmp_path / "artifact"))
    assert verification is not None and "accuracy is not judged" in verification.parity.rule
    manifest = Manifest.read(tmp_path / "artifact")
    assert manifest.parity.quality == "not-applicable" and len(read_parity(tmp_path / "artifact")) < 300


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_refused_where_sums_would_overflow(
    demo_artifacts: dict[tuple[str, str], Path], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(HardwareError, match=r"int8 sums overflow .* no VNNI\. Export another precision: ettin-export"):
        load(demo_artifacts[target, "int8"])
    load(demo_artifacts[target, "fp32"]).close()
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"avx2", "avx_vnni"}))
    load(demo_artifacts[target, "int8"]).close()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(HardwareError, match="no VNNI"):
        load(demo_artifacts[target, "int8"])
