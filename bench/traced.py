"""The naive routes to OpenVINO, as peers: the checkpoint's graph traced as it is, and quantised by stock NNCF."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray

from ettin.export.quantise import calibration_text
from ettin.export.reference import load_gold
from ettin.export.source.checkpoint import read_checkpoint
from ettin.runtimes.batch import Batch, cut
from ettin.runtimes.tokenizer import PairTokenizer

_BATCH = 32  # CrossEncoder's default
_BATCH_TOKENS = 16384  # where 32 pairs would take more memory than there is


class _Whole(torch.nn.Module):
    """Encoder and head, tensors in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.model({"input_ids": input_ids, "attention_mask": attention_mask})["scores"]
        return scores


def traced_predict(folder: Path, how: str) -> tuple[Callable[[Sequence[tuple[str, str]], int], Any], str]:
    """Traces, compiles with OpenVINO's defaults, and scores in padded batches of 32 of like lengths.

    Args:
        folder: the checkpoint.
        how: "default": OpenVINO's own choice of precision; "f32"; "int8": NNCF with its transformer preset.
    """
    checkpoint = read_checkpoint(folder)
    example = torch.randint(5, 200, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    with torch.inference_mode():
        model = ov.convert_model(_Whole(load_gold(checkpoint)), example_input=example, input=[[-1, -1], [-1, -1]])
    tokenizer = PairTokenizer(folder / "tokenizer.json")
    pad = checkpoint.shape.pad_token_id
    if how == "int8":
        model = _quantised(model, [list(Batch.of([ids], pad).padded()) for ids in _calibration(tokenizer)])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"} if how == "f32" else {})
    request = compiled.create_infer_request()

    def predict(pairs: Sequence[tuple[str, str]], max_length: int) -> NDArray[np.float32]:
        sequences = tokenizer.pairs(pairs, max_length)
        scores = np.empty(len(pairs), np.float32)
        for chosen in cut([len(each) for each in sequences], _BATCH_TOKENS, max_pairs=_BATCH):
            inputs = Batch.of([sequences[at] for at in chosen], pad).padded()
            scores[chosen] = request.infer(list(inputs))[0][:, 0]
        return scores

    hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return predict, f"OpenVINO {ov.__version__.split('-')[0]}, traced as it is, {how}, rest {hint}, batch {_BATCH}"


def _calibration(tokenizer: PairTokenizer) -> list[NDArray[np.int32]]:
    return calibration_text().sequences(tokenizer, 512)


def _quantised(model: ov.Model, inputs: list[Any]) -> ov.Model:
    import nncf

    return nncf.quantize(model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs))
