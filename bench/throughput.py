"""Pairs per second of one artifact, tokenising included."""

import time
from collections.abc import Sequence

from ettin.runtimes import Runtime


def pairs_per_s(runtime: Runtime, pairs: Sequence[tuple[str, str]], max_length: int, passes: int = 3) -> list[float]:
    """Speed of each of `passes` timed passes over all pairs, after one that is not counted."""
    runtime.predict(pairs, max_length=max_length)
    speeds = []
    for _ in range(passes):
        start = time.perf_counter()
        runtime.predict(pairs, max_length=max_length)
        speeds.append(len(pairs) / (time.perf_counter() - start))
    return speeds
