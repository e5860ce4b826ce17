"""Checks of the arguments of `predict` and `rank`: pairs, documents and activations."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.errors import InputError, UsageError

if TYPE_CHECKING:  # needs pydantic
    from ettin.artifacts.manifest import Manifest
    from ettin.artifacts.score_calibration import ScoreCalibration

Pair = tuple[str, str]


def pairs_from_inputs(inputs: Any) -> tuple[list[Pair], bool]:
    """The pairs of a pair or an iterable of pairs, and whether it was one pair; raises `InputError`.

    As in CrossEncoder, a list or tuple whose first element is not itself a list, tuple or array is one pair.
    """
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise InputError(
            f"expected a (query, document) pair or a list of them, found {_kind(inputs)}. "
            "For one query and many documents use rank(query, documents)"
        )
    if isinstance(inputs, dict):
        raise InputError("expected a (query, document) pair or a list of them, found a dict")
    items = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
    single = bool(items) and not isinstance(items[0], (list, tuple, np.ndarray))
    if single and isinstance(inputs, (list, tuple, np.ndarray)):
        return [_pair(items, "the pair")], True
    return [_pair(item, f"pair {index}") for index, item in enumerate(items)], False


def _pair(item: Any, name: str) -> Pair:
    if isinstance(item, str) or not isinstance(item, (list, tuple, np.ndarray)):
        raise InputError(f"{name}: expected (query, document), found {_kind(item)}")
    if len(item) != 2:
        raise InputError(f"{name}: expected 2 texts (query, document), found {len(item)}")
    return text(item[0], f"{name}, query"), text(item[1], f"{name}, document")


def text(value: Any, name: str) -> str:
    """Raises `InputError` unless `value` is a string."""
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a string, found {_kind(value)}")
    return value


def documents_from_input(documents: Any) -> list[str]:
    """The documents of one query; raises `InputError` unless they are an iterable of strings."""
    if isinstance(documents, (str, bytes, dict)) or not isinstance(documents, Iterable):
        raise InputError(f"documents: expected a list of strings, found {_kind(documents)}")
    return [text(document, f"document {index}") for index, document in enumerate(documents)]


def checked_length(max_length: int | None, manifest: "Manifest") -> int:
    """The number of tokens that pairs are truncated to; None: the artifact's. Raises `UsageError` beyond its limits."""
    most = manifest.max_length_tokens
    if max_length is None:
        return most
    if not isinstance(max_length, int) or not 3 <= max_length <= most:
        raise UsageError(f"max_length is {max_length}, expected 3 to {most} tokens (what the artifact was made for)")
    return max_length


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]


Scores = NDArray[np.float32]
Activation = Callable[[Scores], Scores]


def identity(logits: Scores) -> Scores:
    """Raw logits."""
    return logits


def sigmoid(logits: Scores) -> Scores:
    """Logistic function, without overflow; distinct logits stay distinct for as long as float32 allows."""
    return np.asarray(np.exp(-np.logaddexp(np.float32(0), -logits)))


def _applied(function: Callable[[Scores], Any], logits: Scores) -> Scores:
    scores = np.asarray(function(logits), np.float32)
    if scores.shape != logits.shape:
        raise UsageError(f"activation_fn turned scores {logits.shape} into {scores.shape}, expected the same shape")
    return scores


_BY_NAME: dict[str, Activation] = {"identity": identity, "sigmoid": sigmoid}


def calibrated(calibration: "ScoreCalibration", logits: Scores) -> Scores:
    """Probabilities of relevance, see `ScoreCalibration`."""
    return sigmoid((np.float32(calibration.slope) * logits + np.float32(calibration.offset)).astype(np.float32))


def resolved(activation: Any, manifest: "Manifest") -> Activation:
    """The function for an `activation_fn` argument; raises `UsageError`.

    Args:
        activation: None (the artifact's own), a name, a function of an array, or, so that CrossEncoder's
            callers need no change, `torch.nn.Identity()` or `torch.nn.Sigmoid()` (known by their class names).
        manifest: the artifact's: its own activation, and its calibration.
    """
    if activation is None:
        return _BY_NAME[manifest.activation]
    if activation == "calibrated":
        if manifest.score_calibration is None:
            raise UsageError(
                f"{manifest.full_name} has no calibration. Fit one on labelled pairs: ettin-calibrate ARTIFACT PAIRS"
            )
        return partial(calibrated, manifest.score_calibration)
    name = activation if isinstance(activation, str) else type(activation).__name__
    if name.lower() in _BY_NAME:
        return _BY_NAME[name.lower()]
    if not isinstance(activation, str) and callable(activation):
        return partial(_applied, activation)
    names = ", ".join((*_BY_NAME, "calibrated"))
    raise UsageError(f"unknown activation {activation!r}, expected one of: {names}, or a function")
