"""Part (a): errors of every setting against fp32 on the same device, and a golden: FlashAttention-2's own scores."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.metrics import score_error
from ettin.bench.workloads import pairs_to_score
from ettin.gpu.visit.models import Pairs, TorchModel, opened_model
from ettin.gpu.visit.report import MAX_LENGTH, Report, Task, free_memory, reason_of
from ettin.gpu.visit.settings import GOLD, REFERENCE, SETTINGS, Setting
from ettin.runtimes.tokenizer import PairTokenizer

_PAIRS = {"cuda": 220, "cpu": 64}
_BATCH = {"pairs": 32, "tokens": 8192}

Scores = NDArray[np.float32]


def run(task: Task, report: Report) -> None:
    """Scores the same pairs in every setting; "rows" has the errors, in logits, and "golden" the scores."""
    pairs = list(dict.fromkeys(pairs_to_score(task.data, _PAIRS[task.device])))
    names = [
        name
        for name, setting in SETTINGS.items()
        if setting.part != "compile" and (task.device == "cuda" or not setting.needs_gpu)
    ]
    with opened_model(task.checkpoint, task.device) as model:
        gold = _scored(model, pairs, SETTINGS[GOLD])
        weights = {"weights": model.checkpoint.name, "weights_sha256": model.checkpoint.weights_sha256()}
        for key, value in {**weights, "pairs": len(pairs), "gold_std": float(gold.std())}.items():
            report.piece(key, value)
        rows: dict[str, dict[str, Any]] = {}
        reference: Scores | None = None
        for name in names:
            if name == GOLD:
                continue
            if report.left_s <= 0:
                report.skipped.append(name)
                continue
            scores, rows[name] = _compared(partial(_scored, model, pairs, SETTINGS[name]), gold)
            if name == REFERENCE and scores is not None:
                reference = scores
                report.piece("golden", {**weights, "cases": _cases(model, pairs, gold, reference)})
            own = rows.get(REFERENCE, {}).get("mean_abs_error")
            if own and scores is not None:
                ratio = rows[name]["mean_abs_error"] / own
                rows[name] |= {"mean_error_of_reference": own, "of_reference": ratio}
            report.piece("rows", rows)


def _scored(model: TorchModel, pairs: Pairs, setting: Setting) -> Scores:
    return setting.ready(model)(pairs, MAX_LENGTH, _BATCH[setting.unit])


def _compared(score: Callable[[], Scores], gold: Scores) -> tuple[Scores | None, dict[str, Any]]:
    """Scores and their error; or why there are none."""
    try:
        scores = score()
    except Exception as error:  # of one setting: the others still say something
        return None, {"problem": reason_of(error)}
    finally:
        free_memory()
    return scores, {**score_error(scores, gold).figures(), "nan": int(np.isnan(scores).sum())}


def _cases(model: TorchModel, pairs: Pairs, gold: Scores, reference: Scores) -> list[dict[str, Any]]:
    """Token ids of each pair with its scores."""
    sequences = PairTokenizer(model.tokenizer_file).pairs(pairs, MAX_LENGTH)
    return [
        {"ids": ids.tolist(), "fp32": fp32, "fa2": fa2}
        for ids, fp32, fa2 in zip(sequences, gold.tolist(), reference.tolist(), strict=True)
    ]
