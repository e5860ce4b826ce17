"""`ettin-bench compare`: real changes are seen, noise is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import EttinError, InputError, UsageError
from ettin.bench.cli import command
from ettin.bench.compare import compare
from ettin.bench.machine import write_result

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def cpu(path: Path, speed: float, mood: float, seed: int, rounds: int = 5, noise: float = 0.02, **more: Any) -> Path:
    """A result: ours at `speed` × the peer's, both moved by the machine's mood, round by round."""
    generator = np.random.default_rng(seed)
    moods = mood * np.exp(generator.normal(0, 0.1, rounds))
    peer = 400 / (100 * moods * np.exp(generator.normal(0, noise, rounds)))
    ours = 400 / (100 * speed * moods * np.exp(generator.normal(0, noise, rounds)))
    entries = [
        {"name": "a/openvino-int8", "passes_s": ours.tolist()},
        {"name": "st-fp32", "passes_s": peer.tolist()},
        {"name": "broken", "problem": "died"},
    ]
    result = {"data": "squad", "pairs": 400, "max_length": 512, "contestants": entries} | more
    write_result(path, "cpu", "ettin-bench cpu", result)
    return path


@pytest.mark.parametrize(
    ("factor", "mood", "word"),
    [(1.25, 1.0, "faster"), (0.75, 1.0, "slower"), (1.0, 1.0, "no difference"), (1.0, 0.6, "no difference"),
     (1.25, 0.6, "faster"), (1.01, 1.0, "no difference")],
)  # fmt: skip
def test_verdicts(tmp_path: Path, factor: float, mood: float, word: str) -> None:
    old, new = cpu(tmp_path / "old", 6.0, 1.0, 1), cpu(tmp_path / "new", 6.0 * factor, mood, 2)
    (verdict,), basis = compare(old, new)
    assert verdict.word == word and verdict.low <= verdict.change <= verdict.high, verdict
    assert verdict.change == pytest.approx(factor - 1, abs=0.05) and "st-fp32" in basis


@pytest.mark.parametrize(("kind", "baseline"), [("throughput", "st-fp32"), ("peers", "sentence-transformers fp32")])
def test_everything_with_contestants_can_be_compared(tmp_path: Path, kind: str, baseline: str) -> None:
    files = cpu(tmp_path / "old", 6.0, 1.0, 1), cpu(tmp_path / "new", 7.5, 0.7, 2)
    for file in files:
        file.write_text(file.read_text().replace('"kind": "cpu"', f'"kind": "{kind}"').replace("st-fp32", baseline))
    (verdict,), basis = compare(*files)
    assert verdict.word == "faster" and f"'{baseline}'" in basis


def test_equal_machines_are_seldom_called_different(tmp_path: Path) -> None:
    words = [
        compare(cpu(tmp_path / "old", 6.0, 1.0, seed), cpu(tmp_path / "new", 6.0, 0.8, seed + 1000))[0][0].word
        for seed in range(100)
    ]
    assert words.count("no difference") >= 90


def test_one_round_tells_nothing(tmp_path: Path) -> None:
    old, new = cpu(tmp_path / "old", 6.0, 1.0, 1, rounds=1), cpu(tmp_path / "new", 9.0, 1.0, 2, rounds=1)
    assert compare(old, new)[0][0].word == "no difference"


def test_unlike_runs_are_refused(tmp_path: Path) -> None:
    old = cpu(tmp_path / "old", 6.0, 1.0, 1)
    with pytest.raises(InputError, match="max_length: 512 in .*, 7999 in "):
        compare(old, cpu(tmp_path / "new", 6.0, 1.0, 1, max_length=7999))
    with pytest.raises(UsageError, match="baseline 'st-bf16' is not in both, which have: a/openvino-int8, st-fp32"):
        compare(old, old, "st-bf16")
    (tmp_path / "text").write_text("[]")
    with pytest.raises(InputError, match="text: not a result of ettin-bench"):
        compare(old, tmp_path / "text")
    (tmp_path / "text").write_text(old.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(InputError, match="schema 2, expected 1"):
        compare(old, tmp_path / "text")
    parity = next(RESULTS.glob("*-parity-*.json"))
    with pytest.raises(InputError, match="results of 'parity' can't be compared, only of: cpu"):
        compare(parity, parity)
    quality = next(RESULTS.glob("*-quality-*.json"))
    with pytest.raises(InputError, match="is of 'cpu', .* of 'quality'"):
        compare(old, quality)


def test_rankings(tmp_path: Path) -> None:
    def result(name: str, drop: float) -> Path:
        generator = np.random.default_rng(1)
        by_query = {
            str(at): float(np.clip(value - drop, 0, 1)) for at, value in enumerate(generator.uniform(0, 1, 300))
        }
        row = {"artifact": "a/openvino-int8", "ndcg10": 0.5, "ndcg10_by_query": by_query}
        write_result(tmp_path / name, "quality", "ettin-bench quality", {"rows": [row]})
        return tmp_path / name

    old = result("old", 0.0)
    assert compare(old, result("worse", 0.02))[0][0].word == "worse"
    assert compare(old, result("same", 0.0))[0][0].word == "no difference"


def test_command(tmp_path: Path) -> None:
    old, new = cpu(tmp_path / "old", 6.0, 1.0, 1), cpu(tmp_path / "new", 4.0, 1.0, 2)
    done = CliRunner().invoke(command, ["compare", str(old), str(new)])
    assert done.exit_code == 0 and "slower" in done.output
    done = CliRunner().invoke(command, ["compare", str(old), str(new), "--check"])
    assert isinstance(done.exception, EttinError) and "a/openvino-int8" in str(done.exception)


def test_committed_results_compare_with_themselves() -> None:
    for file in RESULTS.glob("*-cpu-*.json"):
        assert {each.word for each in compare(file, file)[0]} == {"no difference"}
