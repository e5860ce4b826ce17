"""Two results of the same measurement: what became faster, slower or ranks otherwise, and what can't be told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from ettin.artifacts.errors import InputError, UsageError
from ettin.bench.machine import read_result
from ettin.bench.quality import paired_change

# What must be equal in both, or they did not measure the same.
_SETTINGS = ("data", "pairs", "candidates", "max_length", "filled", "isa", "clients", "requests", "queries", "weights",
             "always_rerank_positives", "device")  # fmt: skip
_WITH_CONTESTANTS = ("cpu", "peers", "throughput")
_COMPARED = (*_WITH_CONTESTANTS, "load", "quality")
_BASELINES = ("st-fp32", "sentence-transformers fp32", "in process")
# A machine's mood moves even a ratio of one run by this much.
FLOOR = 0.03


@dataclass(frozen=True)
class Verdict:
    """On one contestant.

    Args:
        name: of the contestant.
        change: relative for speeds (0.1: a tenth more pairs/s), absolute for nDCG@10.
        low: of its 95 % interval.
        high: of its 95 % interval.
        word: "faster", "slower", "better", "worse" or "no difference".
    """

    name: str
    change: float
    low: float
    high: float
    word: str


def compare(old: Path, new: Path, baseline: str | None = None) -> tuple[list[Verdict], str]:
    """Verdicts on everything that both have, and what the comparison rests on, in words.

    Speeds are compared as ratios to a baseline that ran interleaved with them, round by round, if both results have
    one: the mood of the machine is in both. The interval is Welch's over the logarithms of the rounds. A change that is
    below `FLOOR`, or whose interval holds zero, is no difference. nDCG@10 is compared query by query (bootstrap).

    Args:
        old: a result of `ettin-bench`.
        new: another.
        baseline: a contestant; None: sentence-transformers or the runtime in process, where both have it.

    Raises:
        InputError: not results, or not of the same measurement.
        UsageError: a baseline that they do not both have.
    """
    before, after = read_result(old), read_result(new)
    if before["kind"] != after["kind"]:
        raise InputError(f"{old} is of '{before['kind']}', {new} of '{after['kind']}'. Compare two of a kind")
    if before["kind"] not in _COMPARED:
        raise InputError(f"{old}: results of '{before['kind']}' can't be compared, only of: {', '.join(_COMPARED)}")
    for key in _SETTINGS:
        first, second = (each["result"].get(key) or None for each in (before, after))  # what is off may be left out
        if first != second:
            raise InputError(f"{key}: {first} in {old}, {second} in {new}. Compare two runs with the same settings")
    if before["kind"] == "quality":
        return _rankings(before["result"], after["result"]), "nDCG@10, query by query"
    speeds, others = _speeds(before), _speeds(after)
    common = [name for name in speeds if name in others]
    if baseline is not None and baseline not in common:
        raise UsageError(f"baseline '{baseline}' is not in both, which have: {', '.join(common)}")
    chosen = baseline or next((name for name in _BASELINES if name in common), None)
    verdicts = []
    for name in common:
        if name != chosen:
            verdicts.append(_speed(name, _relative(speeds, name, chosen), _relative(others, name, chosen)))
    words = f"pairs/s as ratio to '{chosen}', round by round" if chosen else "pairs/s; no common baseline: moods count"
    if before["machine"]["cpu"] != after["machine"]["cpu"]:
        words += f"; other machines: {before['machine']['cpu']}, {after['machine']['cpu']}"
    return verdicts, words


def _speeds(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """Pairs per second of each round, by contestant."""
    result = found["result"]
    if found["kind"] in _WITH_CONTESTANTS:
        return {
            each["name"]: [result["pairs"] / seconds for seconds in each["passes_s"]]
            for each in result["contestants"]
            if each.get("passes_s")
        }
    servers = {name: each["pairs_per_s"] for name, each in result["servers"].items()}
    return {"in process": result["in_process_pairs_per_s"], **servers}


def _relative(speeds: Mapping[str, Sequence[float]], name: str, baseline: str | None) -> list[float]:
    base = speeds[baseline] if baseline else [1.0] * len(speeds[name])
    return [float(np.log(one / other)) for one, other in zip(speeds[name], base, strict=True)]


def _speed(name: str, old: Sequence[float], new: Sequence[float]) -> Verdict:
    change = float(np.mean(new) - np.mean(old))
    if min(len(old), len(new)) < 2:  # one round says nothing of its noise
        return Verdict(name, float(np.expm1(change)), float("-inf"), float("inf"), "no difference")
    interval = ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
    low, high = float(interval.low), float(interval.high)
    if not np.isfinite([low, high]).all():  # rounds without any noise
        low = high = change
    certain = low > 0 or high < 0
    word = ("faster" if change > 0 else "slower") if certain and abs(np.expm1(change)) >= FLOOR else "no difference"
    return Verdict(name, float(np.expm1(change)), float(np.expm1(low)), float(np.expm1(high)), word)


def _rankings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Verdict]:
    verdicts = []
    before = {row["artifact"]: row for row in old["rows"]}
    for row in new["rows"]:
        other = before.get(row["artifact"])
        if other is None or "ndcg10_by_query" not in row or "ndcg10_by_query" not in other:
            continue
        pairs = [(value, other["ndcg10_by_query"][query]) for query, value in row["ndcg10_by_query"].items()]
        differences = np.array([one - another for one, another in pairs])
        change, low, high = paired_change([differences])
        word = "better" if low > 0 else "worse" if high < 0 else "no difference"
        verdicts.append(Verdict(row["artifact"], change, low, high, word))
    return verdicts
