"""`ettin-bench throughput`: how the best batch is found, what work counts, and the settings that need a GPU."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support import TINY

from ettin.artifacts.errors import EttinError, UsageError
from ettin.bench import contestant, throughput
from ettin.bench.cli import command
from ettin.bench.contest import Contest, Contestant
from ettin.bench.tables import TABLES
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.source.sizes import DEMO_FOLDER, SIZES
from ettin.runtimes import load

Artifacts = dict[tuple[str, str], Path]


class Scripted:
    """A contestant whose speed by batch size is known; above `memory` it dies."""

    def __init__(self, speeds: dict[int, float], memory: int = 1 << 30) -> None:
        self.speeds, self.memory, self.size = speeds, memory, 0

    def tell(self, order: dict[str, Any]) -> None:
        self.size = order["batch"]

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        if self.size > self.memory:
            raise EttinError("died with signal 9")
        return {"seconds": 100 / self.speeds.get(self.size, 1.0)}


def probe(child: Scripted, monkeypatch: pytest.MonkeyPatch, most: int = 1 << 30) -> tuple[Contestant, dict[str, Any]]:
    @contextmanager
    def started(self: Contest, entry: Contestant) -> Iterator[Scripted]:
        yield child

    monkeypatch.setattr(Contest, "started", started)
    entry = Contestant("ours", "artifact", [])
    return entry, throughput._probe(Contest([("q", "d")] * 100, 1, 64, 1), entry, most)


def test_batches_double_until_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {256: 10.0, 512: 20.0, 1024: 20.1, 2048: 30.0, 4096: 30.1, 8192: 30.2, 16384: 99.0}
    entry, found = probe(Scripted(speeds), monkeypatch)
    assert found["stopped"] == "no gain" and list(found["probed"]) == ["256", "512", "1024", "2048", "4096", "8192"]
    assert entry.batch == found["best"] == 8192


def test_batches_stop_at_the_end_of_memory_and_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = {256 << step: float(step + 1) for step in range(12)}
    entry, found = probe(Scripted(growing, memory=1024), monkeypatch)
    assert entry.batch == 1024 and found["stopped"] == "died with signal 9" and entry.problem is None
    entry, found = probe(Scripted(growing), monkeypatch, most=2000)
    assert entry.batch == 2048 and found["stopped"] == "all pairs in one batch"
    entry, found = probe(Scripted(growing, memory=0), monkeypatch)
    assert entry.problem == "died with signal 9" and found == {}


def test_work_of_a_pair_by_counting() -> None:
    for shape, tokens in ((TINY, 5), (TINY, 300), (SIZES["17m"].shape, 200)):
        position = np.arange(tokens)
        near = float((abs(position[:, None] - position) <= shape.window_tokens).sum())
        weights = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
        expected = 2.0 * tokens * weights * shape.num_layers
        for is_global in shape.global_layers:
            expected += 4.0 * shape.hidden_size * (tokens**2 if is_global else near)
        assert throughput.pair_flops(shape, tokens) == expected
    assert throughput.pair_flops(TINY, 0) == 0


def test_everybody_at_its_best_batch(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    options = ["--checkpoint", str(DEMO_FOLDER), "--setting", "st-fp32", "--pairs", "5", "--passes", "1"]
    options += ["--requests", "2", "--candidates", "5", "--json", str(tmp_path / "t.json")]
    done = CliRunner().invoke(command, ["throughput", str(demo_artifacts["onnx", "fp32"]), *options])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "t.json").read_text())["result"]
    ours, peer = result["contestants"]
    assert ours["batch"]["unit"] == "tokens" and peer["batch"]["unit"] == "pairs"
    for row in (ours, peer):
        assert str(row["batch"]["best"]) in row["batch"]["probed"] and 0 <= row["padding_share"] < 1
        assert 0 < row["share_of_peak"] < 1.5 and row["latency_p50_ms"] > 0 and "latency_p99_ms" not in row
    assert ours["size_mib"] > 1 and ours["max_abs_error"] < 1e-4 and result["requests"] == 2
    table = TABLES["throughput"]([result])
    assert table[2][0] == "sentence-transformers fp32" and table[2][2] == "1.0"


def test_settings_that_do_not_go_together(demo_artifacts: Artifacts) -> None:
    artifact = str(demo_artifacts["onnx", "fp32"])
    for options, message in (
        (["--setting", "st-fp32"], "name it with --checkpoint DIR"),
        (["--setting", "fast", "--checkpoint", "x"], "unknown setting 'fast', expected some of: st-fp32, "),
        (["--setting", "fa2-padded", "--checkpoint", "x"], "'fa2-padded' needs a GPU: --device cuda"),
    ):
        done = CliRunner().invoke(command, ["throughput", artifact, *options])
        assert isinstance(done.exception, UsageError) and message in str(done.exception)


@pytest.mark.parametrize("setting", ["bf16 FA2 padded", "bf16 FA2 unpadded"])
def test_release_settings_score_without_a_gpu(tiny: Checkpoint, setting: str) -> None:
    """The kernel's stand-in, on a CPU: what the GPU's run goes through."""
    subject = contestant.Release(str(tiny.folder), setting, "64", "cpu")
    scores = np.asarray(subject.predict([("a b", "c d e"), ("f", "g " * 200)], 64, 2))
    assert scores.shape == (2,) and np.isfinite(scores).all()


def test_token_budget_is_the_users(demo_artifacts: Artifacts) -> None:
    with load(demo_artifacts["openvino", "fp32"], batch_tokens=64, threads=1) as runtime:
        sizes: list[int] = []
        score: Callable[..., Any] = runtime.score
        runtime.scheduler._score = lambda batch: sizes.append(len(batch)) or score(batch)  # type: ignore[func-returns-value]
        runtime.predict([("a", "b")] * 40)
    assert runtime.limits.batch_tokens == 64 and sizes == [4] * 10
    with pytest.raises(UsageError, match="batch_tokens is 0, expected 1 or more"):
        load(demo_artifacts["openvino", "fp32"], batch_tokens=0)


def test_latency_requests_differ() -> None:
    pairs = [(f"q{at}", f"d{at}") for at in range(5)]
    assert contestant._request(pairs, 0, 2) == [("q0", "d0"), ("q0", "d1")]
    assert contestant._request(pairs, 2, 2) == [("q4", "d4"), ("q4", "d0")]
