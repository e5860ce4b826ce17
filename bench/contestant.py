"""One contestant of a comparison, in a process of its own: loads, then times passes on request.

Reads one JSON object a line from stdin and answers with one: `{"do": "pass"}` scores all pairs, `{"do": "latency"}` one
query with its candidates. The parent interleaves contestants, so all see the same moods of the machine.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Pairs = Sequence[tuple[str, str]]
Predict = Callable[[Pairs, int], Any]

_BATCHES = (4, 8, 16, 32)  # that a tuned peer chooses from


def artifact(path: str, settings: str) -> tuple[Predict, str]:
    """One of ours; settings: JSON, for `load`."""
    from ettin.runtimes import load

    runtime = load(path, **json.loads(settings))
    description = f"{runtime.description}, {runtime.limits.concurrency} at a time"
    return (lambda pairs, max_length: runtime.predict(pairs, max_length=max_length)), description


def cross_encoder(path: str, dtype: str, batch: str) -> tuple[Predict, str]:
    """sentence-transformers with SDPA attention, an explicit dtype, and a batch size or "best"."""
    import torch

    from ettin.export.checkpoint import read_checkpoint
    from ettin.export.gold import load_gold

    model = load_gold(read_checkpoint(Path(path)), getattr(torch, dtype))
    chosen = [int(batch)] if batch != "best" else []

    def predict(pairs: Pairs, max_length: int) -> Any:
        model.max_seq_length = max_length
        texts = [list(pair) for pair in pairs]
        if not chosen and len(texts) > 1:
            chosen.append(_fastest(lambda size: model.predict(texts[:64], batch_size=size)))
        return model.predict(texts, batch_size=chosen[0] if chosen else 1)

    return predict, f"sentence-transformers, torch {torch.__version__}, {dtype}, SDPA, batch {batch}"


def _fastest(run: Callable[[int], Any]) -> int:
    """The batch size that takes the least time, best of two."""
    times: dict[int, float] = {}
    for size in _BATCHES * 2:
        start = time.perf_counter()
        run(size)
        times[size] = min(time.perf_counter() - start, times.get(size, float("inf")))
    return min(times, key=lambda size: times[size])


def traced(path: str, how: str) -> tuple[Predict, str]:
    """The checkpoint's own graph traced into OpenVINO as it is; see `traced_predict`."""
    from ettin.bench.traced import traced_predict

    return traced_predict(Path(path), how)


KINDS: dict[str, Callable[..., tuple[Predict, str]]] = {
    "artifact": artifact,
    "cross-encoder": cross_encoder,
    "traced": traced,
}


def main() -> None:
    """Serves until stdin ends."""
    order = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    predict, description = KINDS[order["kind"]](*order["arguments"])
    pairs: Pairs = [tuple(pair) for pair in order["pairs"]]
    query = pairs[0][0]
    candidates: Pairs = [(query, document) for _, document in pairs[: order["candidates"]]]
    predict(pairs[:1], order["max_length"])
    _answer({"description": description, "load_s": time.perf_counter() - start})
    for line in sys.stdin:
        chosen = pairs if json.loads(line)["do"] == "pass" else candidates
        start = time.perf_counter()
        scores = predict(chosen, order["max_length"])
        seconds = time.perf_counter() - start
        _answer({"seconds": seconds, "peak_rss_mib": _peak_rss_mib(), "scores": [float(score) for score in scores]})


def _peak_rss_mib() -> float:
    """Of this program alone: `getrusage` would begin with what the parent had when it started this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _answer(values: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(values) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
