"""`ettin-bench report`: tables and plots are what the results say."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import EttinError, InputError
from ettin.bench.cli import command
from ettin.bench.machine import read_result, write_result
from ettin.bench.plots import PLOTS
from ettin.bench.report import filled, label

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
ROW = {"name": "st-fp32", "pairs_per_s": 100.0, "latency_p50_ms": 10.0, "peak_rss_mib": 5.0, "load_s": 1.0, "nan": 0}
OURS = {**ROW, "name": "17m/openvino-int8", "pairs_per_s": 650.0, "max_abs_error": 0.12}
TRACED = {"name": "traced", "problem": "no kernel"}


def test_every_committed_result_is_read() -> None:
    assert len({read_result(file)["kind"] for file in RESULTS.glob("*.json")}) == 10


def test_command(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", "cpu", {"candidates": 7, "contestants": [OURS, ROW, TRACED]})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: cpu r.json -->\nstale\n<!-- end of table -->\nafter\n")
    report = ["report", str(page)]
    stale = CliRunner().invoke(command, [*report, "--check"])
    assert isinstance(stale.exception, EttinError) and f"ettin-bench report {page}" in str(stale.exception)
    assert CliRunner().invoke(command, report).exit_code == 0
    text = page.read_text()
    assert "| `openvino` int8 " in text and "| 650" in text and "| 6.5 " in text and "no kernel" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert CliRunner().invoke(command, [*report, "--check"]).exit_code == 0


def test_marks_that_name_something_else(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", "cpu", {"candidates": 7, "contestants": [OURS]})
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "later.json").write_text((tmp_path / "r.json").read_text().replace('"schema": 1', '"schema": 2'))
    for mark, message in (
        ("plot r.json", "unknown table 'plot'"),
        ("quality r.json", "table 'quality': its results lack 'data'"),
        ("cpu missing.json", r"missing\.json: not a result"),
        ("cpu other.json", r"other\.json: not a result of ettin-bench \(it lacks 'schema'\)"),
        ("cpu later.json", "schema 2, expected 1"),
    ):
        with pytest.raises(InputError, match=message):
            filled(f"<!-- table: {mark} -->\n<!-- end of table -->", tmp_path)


def test_ratio_with_its_range(tmp_path: Path) -> None:
    ours = {**OURS, "ratio": {"to": "st-fp32", "median": 6.5, "low": 6.25, "high": 7.0}, "batch": {}}
    write_result(tmp_path / "r.json", "speed", {"candidates": 7, "contestants": [ours, ROW]})
    text = filled("<!-- table: speed r.json -->\n<!-- end of table -->", tmp_path)
    assert "6.50 (6.25 … 7.00)" in text and "padding" not in text and "1e-01" in text


def test_labels() -> None:
    assert label("a/openvino-int8") == "`openvino` int8" and label("optimum, onnx-int8") == "optimum, onnx-int8"
    assert label("st-fp32").endswith("batch of 32") and label("st-fp32", True) == "sentence-transformers fp32"


def test_plots_that_a_page_shows(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results, ignore=shutil.ignore_patterns("*.svg", "*.md", "soak"))
    links = [f"![plot](plots/{name})" for name in PLOTS]
    (results / "README.md").write_text("\n".join([*links, "![other](plots/other.svg)"]))
    (results / "plots").mkdir(exist_ok=True)
    for _ in range(2):
        done = CliRunner().invoke(command, ["report", str(results / "README.md")])
        assert done.exit_code == 0, done.exception
        drawn = {file.name: file.read_text() for file in (results / "plots").iterdir()}
        assert drawn.keys() == PLOTS.keys() and all(text.startswith("<svg") for text in drawn.values())
        for name, text in drawn.items():  # what is drawn and labelled is what is committed
            shown = re.findall(r"<text[^>]*>([^<]*)</text>", text)
            assert shown == re.findall(r"<text[^>]*>([^<]*)</text>", (RESULTS / "plots" / name).read_text()), name
    for file in results.glob("*-lengths-*.json"):
        file.unlink()
    with pytest.raises(InputError, match="a plot of lengths has no result"):
        CliRunner().invoke(command, ["report", str(results / "README.md")], catch_exceptions=False)


def test_result_says_where_and_how_it_was_measured(tmp_path: Path) -> None:
    write_result(tmp_path / "new" / "r.json", "cpu", {"figure": 1}, "ettin-bench speed x")
    content = json.loads((tmp_path / "new" / "r.json").read_text())
    assert content["command"] == "ettin-bench speed x" and content["result"] == {"figure": 1}
    assert content["machine"].keys() >= {"cpu", "cpus_usable", "isa", "isa_limit", "python", "system", "versions"}
