"""The two RoPE bases, read from a config without a default: a wrong one gives plausible, wrong scores."""

from pathlib import Path
from typing import Any

from ettin.artifacts.errors import UnsupportedCheckpoint

_KINDS = (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta"))


def rope_thetas(path: Path, config: dict[str, Any]) -> tuple[float, float]:
    """Bases of the global and the local layers.

    transformers 5 writes `rope_parameters`, transformers 4 `global_rope_theta` and `local_rope_theta`; each reads
    the other's config with ModernBERT's defaults (local 10000, where Ettin has 160000) without a word.

    Args:
        path: of the config, for messages.
        config: its content.

    Raises:
        UnsupportedCheckpoint: a base is not stated, stated twice with different values, or not plain RoPE.
    """
    found = []
    for kind, old_key in _KINDS:
        parameters = (config.get("rope_parameters") or {}).get(kind) or {}
        if parameters.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise UnsupportedCheckpoint(f"{path}: scaled RoPE {parameters}, expected rope_type 'default'")
        stated = {value for value in (parameters.get("rope_theta"), config.get(old_key)) if value is not None}
        if not stated:
            raise UnsupportedCheckpoint(
                f"{path}: states no RoPE base for {kind} (neither rope_parameters nor {old_key}), and the default of "
                "ModernBERT is wrong for Ettin. Save the checkpoint again with transformers 5"
            )
        if len(stated) > 1:
            raise UnsupportedCheckpoint(
                f"{path}: states two RoPE bases for {kind}, {sorted(stated)}: a transformers-4 config read with the "
                "wrong theta. Save the checkpoint again with transformers 5"
            )
        found.append(float(stated.pop()))
    return found[0], found[1]


def check_read_by_transformers(path: Path, config: Any, thetas: tuple[float, float]) -> None:
    """Refuses when the installed transformers read other bases than the config states.

    Raises:
        UnsupportedCheckpoint: it did.
    """
    read = tuple(float(config.rope_parameters[kind]["rope_theta"]) for kind, _ in _KINDS)
    if read != thetas:
        raise UnsupportedCheckpoint(
            f"{path}: states RoPE bases {thetas}, transformers reads {read}: a transformers-4 config read with the "
            "wrong theta. Save the checkpoint again with transformers 5"
        )
