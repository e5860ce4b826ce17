"""What is applied to raw logits, once, in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ettin.artifacts.errors import UsageError

Scores = NDArray[np.float32]
Activation = Callable[[Scores], Scores]


def identity(logits: Scores) -> Scores:
    """Raw logits."""
    return logits


def sigmoid(logits: Scores) -> Scores:
    """Logistic function, without overflow; distinct logits stay distinct for as long as float32 allows."""
    return np.asarray(np.exp(-np.logaddexp(np.float32(0), -logits)))


_BY_NAME: dict[str, Activation] = {"identity": identity, "sigmoid": sigmoid}


def resolved(activation: Any, default: str) -> Activation:
    """The function that an `activation_fn` argument means.

    Args:
        activation: None (the artifact's own), a name, a function of an array, or, so that CrossEncoder's
            callers need no change, `torch.nn.Identity()` or `torch.nn.Sigmoid()` (known by their class names).
        default: name of the artifact's own.

    Raises:
        UsageError: something else.
    """
    if activation is None:
        return _BY_NAME[default]
    name = activation if isinstance(activation, str) else type(activation).__name__
    if name.lower() in _BY_NAME:
        return _BY_NAME[name.lower()]
    if not isinstance(activation, str) and callable(activation):
        return lambda logits: np.asarray(activation(logits), np.float32)
    raise UsageError(f"unknown activation {activation!r}, expected one of: {', '.join(_BY_NAME)}, or a function")
