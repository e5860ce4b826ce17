"""`ettin-bench speed`: contestants, their settings, and what it says."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support import run

from ettin.artifacts.errors import EttinError, UsageError
from ettin.bench import peaks
from ettin.bench.cli import command
from ettin.bench.contest import Contest, Contestant
from ettin.bench.report import TABLES
from ettin.bench.speed import pairs_for
from ettin.export.source.checkpoint import read_checkpoint
from ettin.export.source.sizes import SIZES
from ettin.runtimes import load
from ettin.runtimes.batch import round_up

Artifacts = dict[tuple[str, str], Path]


def speed(*words: str | Path) -> Any:
    return CliRunner().invoke(command, ["speed", *map(str, words)])


def test_first_command_of_a_user(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["openvino", "bf16"]
    options = ("--pairs", "8", "--rounds", "1", "--requests", "1", "--json", "r.json")
    done = run("ettin-bench", "speed", artifact, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    (row,) = content["result"]["contestants"]
    assert content["kind"] == "speed" and content["machine"]["cpu"] and content["machine"]["versions"]["openvino"]
    assert "ettin-bench speed" in content["command"] and content["result"]["weights"] == "checkpoint"
    assert row["pairs_per_s"] > 0 and "best" not in row["batch"] and "pairs/s" in done.stdout


def test_everybody_at_its_best_batch(
    demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "_CPU_SIZES", (512,))
    done = speed(demo_artifacts["onnx", "fp32"], "--checkpoint", "demo", "--peer", "st-fp32", "--best-batch",
                 "--pairs", 5, "--rounds", 1, "--requests", 2, "--json", tmp_path / "t.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "t.json").read_text())["result"]
    ours, peer = result["contestants"]
    assert ours["batch"]["unit"] == "tokens" and peer["batch"]["unit"] == "pairs"
    for row in (ours, peer):
        assert str(row["batch"]["best"]) in row["batch"]["probed"] and 0 <= row["padding_share"] < 1
        assert 0 < row["share_of_peak"] < 1.5 and row["latency_p50_ms"] > 0 and "latency_p99_ms" not in row
    assert ours["size_mib"] > 1 and ours["max_abs_error"] < 1e-4 and result["requests"] == 2
    assert ours["ratio"]["to"] == "st-fp32"
    table = TABLES["speed"]([result])
    assert table[2][0] == "sentence-transformers fp32" and f"{ours['batch']['best']} tokens" in table[1]


def test_earlier_version_lengths_and_settings(
    demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI")
    done = speed(demo_artifacts["openvino", "fp32"], "--before", sys.executable, "--length", 16, "--length", 32,
                 "--rounds", 1, "--requests", 1, "--load", "streams", 1, "--load", "cache_dir", tmp_path / "cache",
                 "--pairs", 4, "--json", tmp_path / "l.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "l.json").read_text())["result"]
    assert result["isa"] == "avx2_vnni" and result["load"] == {"streams": 1, "cache_dir": f"{tmp_path}/cache"}
    assert [(step["max_length"], step["tokens_per_pair"]) for step in result["lengths"]] == [(16, 16), (32, 32)]
    before, now = result["lengths"][0]["contestants"]
    assert before["name"] == f"{now['name']} (before)" == now["ratio"]["to"] and before["padding_share"] == 0
    assert "1 at a time" in now["description"] and list((tmp_path / "cache").rglob("*.blob"))
    assert "`openvino` fp32 (before)" in TABLES["speed"]([result])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peer", "st-fp32"], "'st-fp32' runs the checkpoint: name it with --checkpoint"),
        (["--peer", "fastembed"], "'fastembed' needs an environment of its own"),
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_options_that_do_not_go_together(demo_artifacts: Artifacts, options: list[str], message: str) -> None:
    done = speed(demo_artifacts["onnx", "fp32"], *options)
    assert isinstance(done.exception, EttinError) and message in str(done.exception)


def test_random_weights_of_a_size(demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []

    def run(self: Contest, entries: list[Contestant]) -> None:
        layers.append(read_checkpoint(Path(entries[1].arguments[0])).shape.num_layers)
        for entry in entries:
            entry.problem = "not run"

    monkeypatch.setattr(Contest, "run", run)
    done = speed(demo_artifacts["onnx", "fp32"], "--checkpoint", "17m", "--peer", "st-fp32")
    assert done.exit_code == 0 and layers == [SIZES["17m"].num_layers] and "not run" in done.output


def test_larger_models_get_fewer_pairs() -> None:
    for device, least in (("cpu", 8), ("cuda", 256)):
        counts = [pairs_for(size.shape, device) for size in SIZES.values()]
        assert counts == sorted(counts, reverse=True) and counts[-1] == least and counts[0] > 10 * least / 2


def test_token_budget_is_the_users(demo_artifacts: Artifacts) -> None:
    with load(demo_artifacts["openvino", "fp32"], batch_tokens=64, threads=1) as runtime:
        sizes: list[int] = []
        score = runtime.score
        runtime.scheduler._score = lambda batch: sizes.append(len(batch)) or score(batch)  # type: ignore[func-returns-value]
        runtime.predict([("a", "b")] * 40)
    largest = 64 // round_up(5, runtime.limits.length_multiple)  # each pair has 5 tokens
    assert runtime.limits.batch_tokens == 64 and sizes == [min(largest, 40 - done) for done in range(0, 40, largest)]
    with pytest.raises(UsageError, match="batch_tokens is 0, expected 1 or more"):
        load(demo_artifacts["openvino", "fp32"], batch_tokens=0)
