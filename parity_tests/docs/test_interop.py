"""`interop/`: the page follows from the results, and the comparison can fail."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ettin.artifacts.manifest import Manifest
from ettin.export.targets import ONNX, OPENVINO, TRANSFORMERS

ROOT = Path(__file__).parents[2]
TARGETS = {target.name: target for target in (ONNX, OPENVINO, TRANSFORMERS)}
HEADER = "# system: a program\n# artifact: onnx fp32\n# requires: nothing\n# largest error: 1e-4\n"


def interop() -> Any:
    spec = importlib.util.spec_from_file_location("interop_run", ROOT / "interop" / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["interop_run"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


RUN = interop()


def test_the_page_is_made_from_the_results() -> None:
    assert (ROOT / "docs" / "interop.md").read_text(encoding="utf-8") == RUN.page(), "run: make interop"


def test_results_are_those_of_the_systems_and_as_expected() -> None:
    stored = {path.stem for path in (ROOT / "interop" / "results").glob("*.json")}
    assert stored == {system.path.stem for system in RUN.systems()}
    for system in RUN.systems():
        result = json.loads((ROOT / "interop" / "results" / f"{system.path.stem}.json").read_text(encoding="utf-8"))
        assert tuple(result["requires"]) == system.requires, f"run: python interop/run.py {system.path.stem}"
        results = [RUN.Result(**row) for row in result["results"]]
        assert tuple(row.precision for row in results) == system.precisions
        assert RUN.failures(system, results) == []


@pytest.mark.parametrize("system", RUN.systems(), ids=lambda system: system.path.stem)
def test_headers(system: Any) -> None:
    assert set(system.precisions) <= set(TARGETS[system.target].precisions)
    assert len(system.limits) == len(system.precisions) and system.score in ("logit", "sigmoid")
    for requirement in system.requires:
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+|@?[\w./-]+@[\w.-]+|ettin-export\[[\w,-]+\]", requirement), (
            requirement
        )


def test_a_program_runs_and_is_compared(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    """ONNX Runtime and tokenizers are in this environment, too."""
    system = RUN.system_of(ROOT / "interop" / "systems" / "onnxruntime_python.py")
    for precision in system.precisions:
        folder = demo_artifacts["onnx", precision]
        assert Manifest.read(folder).precision == precision
        (result,) = [RUN._run_precision(system, folder, precision, [sys.executable, system.path])]
        assert result.problem is None and result.largest_error is not None
        assert result.largest_error <= system.limits[system.precisions.index(precision)]


@pytest.mark.parametrize(
    ("code", "found", "failure"),
    [
        ("print([0.0] * 6)", RUN.Result("fp32", 13.0, None), "largest error 13.0, limit 0.0001"),
        ("print([0.0] * 5)", RUN.Result("fp32", None, f"its scores are {[0.0] * 5}"), "its scores are"),
        ("print('[NaN, 1, 1, 1, 1, 1]')", RUN.Result("fp32", None, "its scores are [nan, "), "its scores are"),
        ("raise ValueError('no head')", RUN.Result("fp32", None, "ValueError: no head"), "ValueError: no head"),
    ],
)
def test_what_goes_wrong_is_a_failure(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, code: str, found: Any, failure: str
) -> None:
    (tmp_path / "program.py").write_text(HEADER + code)
    system = RUN.system_of(tmp_path / "program.py")
    assert system.code == code
    results = RUN.run(system, demo_artifacts["onnx", "fp32"], [sys.executable, system.path])
    (line,) = RUN.failures(system, results)
    assert failure in line and results[0].precision == "fp32"
    assert results[0].largest_error == found.largest_error and (results[0].problem or "").startswith(
        found.problem or ""
    )
