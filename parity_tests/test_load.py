"""`ettin-bench load` for a few seconds, and that it sees what it is there to see."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ettin.bench.cli import command
from ettin.bench.load import Tally
from ettin.bench.load_servers import Asked

HAS_TRITON = importlib.util.find_spec("pytriton") is not None


@pytest.mark.triton
@pytest.mark.skipif(not HAS_TRITON, reason='needs pip install "ettin-export[triton]"')
def test_short_load(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    options = ["--clients", "8", "--requests", "8", "--candidates", "20", "--rounds", "1", "--minutes", "0.05"]
    file = tmp_path / "load.json"
    artifact = str(demo_artifacts["openvino", "int8"])
    done = CliRunner().invoke(command, ["load", artifact, *options, "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())["result"]
    assert result["servers"].keys() == {"triton", "http"} and "Triton, gRPC" in done.output
    for row in result["servers"].values():
        assert row["share_of_in_process"] > 0 and len(row["pairs_per_s"]) == 1 and min(row["memory_mib"]) > 50
        assert row["full"]["answers"] == 8 and row["full"]["pairs"] == 160 and row["mixed"]["answers"] > 8
        assert row["full"]["latency_ms"].keys() == {"20"} and row["mixed"]["latency_ms"].keys() == {"1", "20"}
        assert not row["full"]["wrong"] + row["full"]["lost"] + row["mixed"]["wrong"] + row["mixed"]["lost"]


def test_wrong_and_lost_answers_are_counted() -> None:
    tally, asked = Tally(tolerance=0.1), Asked("q", ["a", "b"], np.array([1.0, 2.0], np.float32))

    def fail(_: Asked) -> np.ndarray:
        raise ConnectionError("gone")

    tally.ask(lambda each: each.gold + 0.05, asked)
    tally.ask(lambda each: each.gold[::-1], asked)
    tally.ask(lambda each: each.gold * np.nan, asked)
    tally.ask(fail, asked)
    figures = tally.figures()
    assert (figures["answers"], figures["wrong"], figures["lost"]) == (3, 2, 1)
    assert figures["first_errors"] == ["ConnectionError: gone"]
