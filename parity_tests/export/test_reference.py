"""What the reference measures besides scores: the largest activation, which fp16 must be able to hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ettin.artifacts.errors import ParityError
from ettin.artifacts.tolerances import FP16_MAX_ACTIVATION
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.proof_pairs import natural_pairs
from ettin.export.reference import _largest, load_gold, score_gold
from ettin.export.source.checkpoint import Checkpoint

LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ([1.0, -3.0], 3.0),
        ([5.0, -3.0], 5.0),
        ([-float("inf"), -7.0, 2.0], 7.0),
        ([LEAST, 2.0], 2.0),
        ([LEAST, -float("inf")], 0.0),
        ([float("nan"), -4.0, 1.0], 4.0),
        ([float("inf"), 1.0], float("inf")),
    ],
)
def test_masks_are_no_activations(values: list[float], largest: float) -> None:
    assert _largest(torch.tensor(values)) == largest


def test_every_module_is_watched(tiny: Checkpoint) -> None:
    """The largest value of all inputs and outputs of the modules that have no parts."""
    pairs = natural_pairs()[:3]
    gold = score_gold(tiny, pairs, 64, with_bf16=False, with_activations=True)
    model, seen = load_gold(tiny), []
    for module in model[0].modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    for case in gold.cases:
        ids = torch.tensor([case.ids])
        with torch.inference_mode():
            model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    expected = max(float(value.abs().max()) for value in seen if torch.is_tensor(value) and value.is_floating_point())
    assert expected > 1 and gold.max_activation == pytest.approx(expected, rel=1e-4)
    assert score_gold(tiny, pairs, 64, with_bf16=False, with_activations=False).max_activation is None


def test_fp16_is_refused_where_an_activation_is_too_large(tiny: Checkpoint, tmp_path: Path) -> None:
    gold = score_gold(tiny, natural_pairs()[:1], 64, with_bf16=False, with_activations=True)
    for largest in (FP16_MAX_ACTIVATION * 1.01, float("inf"), None):
        export = Export(tiny, Options(), _gold=replace(gold, max_activation=largest))
        with pytest.raises(ParityError, match="fp16 ends at 65504, an activation of gold reaches"):
            export.run(Job("onnx", "fp16", tmp_path / "artifact"))
    assert list(tmp_path.iterdir()) == []
