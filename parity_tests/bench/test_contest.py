"""The harness that times things: how the best batch is found, what is counted, and what a result says."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ettin.artifacts.errors import EttinError
from ettin.bench.child import Child
from ettin.bench.contest import Contest, Contestant, figures
from ettin.bench.contestants import request_pairs
from ettin.bench.workloads import pairs_to_score
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes.tokenizer import PairTokenizer

Artifacts = dict[tuple[str, str], Path]


class Scripted(Child):
    """A contestant whose speed by batch size is known; above `memory` it dies."""

    def __init__(self, speeds: dict[int, float], memory: int = 1 << 30) -> None:
        self.speeds, self.memory, self.size = speeds, memory, 0

    def tell(self, order: Any) -> None:
        self.size = order["batch"]

    def ask(self, order: Any) -> dict[str, Any]:
        if self.size > self.memory:
            raise EttinError("died with signal 9")
        return {"seconds": 100 / self.speeds.get(self.size, 1.0)}


def searched(process: Scripted, max_length: int = 1 << 20, **options: Any) -> Contestant:
    entry = Contestant("ours", "artifact", [], facts={"first_batch": 256, "batch_unit": "tokens"})
    Contest([("q", "d")] * 100, 1, max_length, 1, **options).search_batch(entry, process)
    return entry


def test_batches_double_until_nothing_is_gained() -> None:
    speeds = {256: 10.0, 512: 20.0, 1024: 20.1, 2048: 30.0, 4096: 30.1, 8192: 30.2, 16384: 99.0}
    entry = searched(Scripted(speeds))
    assert entry.search["stopped"] == "no gain"
    assert list(entry.search["probed"]) == ["256", "512", "1024", "2048", "4096", "8192"]
    assert entry.batch == entry.search["best"] == 8192


def test_batches_stop_at_the_end_of_memory_of_the_pairs_and_of_time() -> None:
    growing = {256 << step: float(step + 1) for step in range(12)}
    entry = searched(Scripted(growing, memory=1024))
    assert entry.batch == 1024 and entry.search["stopped"] == "died with signal 9" and entry.problem is None
    entry = searched(Scripted(growing), max_length=20)
    assert entry.batch == 2048 and entry.search["stopped"] == "all pairs in one batch"
    entry = searched(Scripted(growing), search_until=0.0)
    assert entry.batch == 256 and entry.search["stopped"] == "out of time"
    entry = searched(Scripted(growing, memory=0))
    assert entry.problem == "died with signal 9" and entry.search == {} and entry.batch is None


def test_figures_of_a_contestant() -> None:
    reference = Contestant(
        "st-fp32", "cross-encoder", [], passes_s=[4.0] * 3, latencies_s=[1.0], scores=[1.0, 2.0, 4.0]
    )
    entry = Contestant("ours", "artifact", [], passes_s=[2.0, 1.0, 4.0], latencies_s=[0.2, 0.1, 0.3])
    entry.scores = [1.0, 2.5, 4.0]
    row = figures(entry, 100, reference, reference)
    assert row["pairs_per_s"] == 50 and row["latency_p50_ms"] == 200 and "latency_p99_ms" not in row
    assert row["max_abs_error"] == 0.5 and row["spearman"] == 1 and row["nan"] == 0
    assert row["ratio"] == {"to": "st-fp32", "median": 2.0, "low": 1.0, "high": 4.0}
    assert "ratio" not in figures(reference, 100, reference, reference)
    entry.scores[0] = float("nan")
    row = figures(entry, 100, reference)
    assert row["nan"] == 1 and "max_abs_error" not in row and "ratio" not in row
    entry.latencies_s = [0.1] * 20
    assert figures(entry, 100)["latency_p99_ms"] == pytest.approx(100)
    entry.problem = "died with signal 8"
    assert figures(entry, 100, reference) == {"name": "ours", "problem": "died with signal 8"}


def test_ratios_are_taken_round_by_round() -> None:
    """The speed of the machine changes by a factor of four; the ratio does not."""
    machine = np.array([1.0, 4.0, 2.0])
    ours = Contestant("ours", "artifact", [], passes_s=list(machine), latencies_s=[1.0])
    other = Contestant("st-fp32", "cross-encoder", [], passes_s=list(3 * machine))
    assert figures(ours, 1, None, other)["ratio"] == {"to": "st-fp32", "median": 3.0, "low": 3.0, "high": 3.0}


def test_latency_requests_differ() -> None:
    pairs = [(f"q{index}", f"d{index}") for index in range(5)]
    assert request_pairs(pairs, 0, 2) == [("q0", "d0"), ("q0", "d1")]
    assert request_pairs(pairs, 2, 2) == [("q4", "d4"), ("q4", "d0")]


def entries_of(artifact: Path) -> list[Contestant]:
    return [
        Contestant("a/ours", "artifact", [str(artifact), '{"streams": 1}']),
        Contestant("st-fp32", "cross-encoder", [str(DEMO_FOLDER), "float32"]),
    ]


def test_contest_in_processes(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    entries = entries_of(demo_artifacts["openvino", "fp32"])
    entries.append(Contestant("a/missing", "artifact", [str(tmp_path / "missing"), "{}"]))
    pairs = pairs_to_score(None, 6)
    Contest(pairs, 3, 64, rounds=2, requests=2).run(entries)
    ours, peer, missing = (figures(entry, len(pairs), entries[1], entries[1]) for entry in entries)
    assert len(ours["passes_s"]) == 2 and len(ours["latencies_ms"]) == 4 and ours["load_s"] > 0
    assert ours["max_abs_error"] < 1e-4 and "1 at a time" in ours["description"] and ours["ratio"]["to"] == "st-fp32"
    assert "no such folder" in missing["problem"] and "SDPA, batch 32" in peer["description"]
    assert ours["versions"]["openvino"] and peer["versions"]["sentence-transformers"]
    assert ours["padding_share"] == peer["padding_share"] == 0  # every pair fills its 64 tokens


def test_padding_is_counted_at_the_batch_that_was_found(demo_artifacts: Artifacts) -> None:
    pairs = [("a", "b"), ("a", "b " * 28), ("a", "b " * 30)]
    tokenizer = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
    short, middle, long = (len(ids) for ids in tokenizer.pairs(pairs, 64))
    entries = entries_of(demo_artifacts["onnx", "fp32"])
    entries[0].batch, entries[1].batch = 2 * long, 2
    Contest(pairs, 2, 64, rounds=1, together=True).run(entries)
    for entry in entries:  # both of them cut [long, middle], [short]
        assert entry.facts["padding_share"] == pytest.approx((long - middle) / (2 * long + short)), entry


def test_memory_is_the_contestants_own(demo_artifacts: Artifacts) -> None:
    """A child begins with its parent's peak in what `getrusage` says."""
    ballast = np.ones(900 << 17)  # 900 MiB
    entries = entries_of(demo_artifacts["openvino", "int8"])[:1]
    Contest([("a", "b")] * 4, 2, 64, rounds=1).run(entries)
    assert ballast[-1] == 1 and 50 < entries[0].facts["peak_rss_mib"] < 700


def test_death_of_a_process_is_its_reason() -> None:
    entry = Contestant("ours", "artifact", ["x", "not JSON"])
    Contest([("a", "b")], 1, 64, 1).run([entry])
    assert entry.problem is not None and entry.problem.startswith("json.decoder.JSONDecodeError")


BROUGHT = """
import pathlib, time

class Brought:
    batch_unit, first_batch, description = "pairs", 2, "brought along"
    def __init__(self, most, starts, sleeps_s):
        self.most, self.sleeps_s = int(most), float(sleeps_s)
        with pathlib.Path(starts).open("a") as file:
            file.write("start ")
    def predict(self, pairs, max_length, batch):
        time.sleep(0.1 / (batch or 2) if len(pairs) == 1 else max(self.sleeps_s, 0.1 / batch))
        if batch and batch > self.most:
            raise MemoryError("too much")
        return [0.5] * len(pairs)

class Slow(Brought):
    def __init__(self, *_):
        time.sleep(60)
"""


def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, sleeps_s: float = 0.0) -> Contestant:
    """A contestant of a module that the harness does not know."""
    (tmp_path / "brought.py").write_text(BROUGHT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["brought:Brought", str(most), str(tmp_path / "starts"), str(sleeps_s)]
    return Contestant("brought", "imported", arguments, searches=True)


def test_a_contestant_that_runs_out_of_memory_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = brought(tmp_path, monkeypatch, most=8)
    Contest([("q", "d")] * 64, 1, 64, 2, together=True).run([entry])
    assert entry.search["stopped"] == "MemoryError: too much" and entry.batch == 8
    assert entry.problem is None and len(entry.passes_s) == 2 and entry.scores == [0.5] * 64
    assert (tmp_path / "starts").read_text() == "start "  # one process searches and is timed


def test_a_contest_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = brought(tmp_path, monkeypatch, most=8, sleeps_s=60)
    start = time.monotonic()
    Contest([("q", "d")] * 64, 1, 64, 2, until=start + 1.5, together=True).run([entry])
    assert entry.problem == "out of time" and figures(entry, 64) == {"name": "brought", "problem": "out of time"}
    slow, fast = (brought(tmp_path, monkeypatch, most=8) for _ in range(2))
    slow.arguments[0] = "brought:Slow"
    Contest([("q", "d")] * 64, 1, 64, 2, load_until=time.monotonic() + 12, together=True).run([slow, fast])
    assert slow.problem == "out of time" and fast.problem is None and len(fast.passes_s) == 2
