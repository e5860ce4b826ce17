"""What is marked as experimental is what no result file proves."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ettin.artifacts.targets import DEVICES, GROUP, target_named
from ettin.gpu.marks import NOT_RUN, PROOFS, mark

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def contradictions(proofs: dict[str, str | None], results: Path) -> list[str]:
    """Where the marks and the results of visits to machines with a GPU contradict each other."""
    proven: dict[str, set[str]] = {}
    for file in sorted(results.rglob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("kind") == "gpu-visit":
            for path, outcome in content["result"]["paths"].items():
                if outcome["passed"] is True:
                    proven.setdefault(path, set()).add(file.relative_to(results).as_posix())
    found = [f"{path}: {name} does not list it as passed" for path, name in proofs.items()
             if name is not None and name not in proven.get(path, set())]  # fmt: skip
    found += [f"{path}: marked as experimental, and {min(files)} proves it" for path, files in proven.items()
              if path in proofs and proofs[path] is None]  # fmt: skip
    return found + [f"{path}: not in the table of marks" for path in proven.keys() - proofs.keys()]


def test_marks_say_what_the_results_say() -> None:
    assert contradictions(PROOFS, RESULTS) == []


@pytest.mark.parametrize(
    ("name", "outcome", "expected"),
    [
        (None, {"passed": False}, []),
        (None, {"passed": True}, ["trt: marked as experimental, and visit.json proves it"]),
        (None, {"passed": "yes"}, []),
        ("visit.json", {"passed": True}, []),
        ("visit.json", {"passed": False}, ["trt: visit.json does not list it as passed"]),
        ("other.json", {"passed": True}, ["trt: other.json does not list it as passed"]),
    ],
)
def test_a_contradiction_is_found(tmp_path: Path, name: str | None, outcome: Any, expected: list[str]) -> None:
    visit = {"kind": "gpu-visit", "result": {"paths": {"trt": outcome}}}
    (tmp_path / "visit.json").write_text(json.dumps(visit))
    (tmp_path / "cpu.json").write_text(
        json.dumps({"kind": "cpu", "result": {"paths": {"onnx.cuda": {"passed": True}}}})
    )
    assert contradictions({"trt": name, "onnx.cuda": None}, tmp_path) == expected


def test_a_path_without_a_mark_is_found(tmp_path: Path) -> None:
    visit = {"kind": "gpu-visit", "result": {"paths": {"onnx.tpu": {"passed": True}}}}
    (tmp_path / "visit.json").write_text(json.dumps(visit))
    assert contradictions({}, tmp_path) == ["onnx.tpu: not in the table of marks"]


def test_every_path_that_is_registered_has_a_mark() -> None:
    """What runs on a GPU is in this package; nothing in it runs on a CPU."""
    groups = PROJECT["project"]["entry-points"]
    registered = {name for group in (GROUP, DEVICES) for name, value in groups[group].items() if "ettin.gpu:" in value}
    assert registered == set(PROOFS)
    for path in PROOFS:
        name, _, device = path.partition(".")
        target = target_named(name)
        component = target.component(device or target.device)
        assert component.experimental == mark(path) and component.path.startswith("ettin.gpu.engines."), path
    others = set(groups[GROUP]) - set(PROOFS)
    assert {target_named(name).device for name in others} == {"cpu"}


def test_a_proof_lifts_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROOFS, "trt", None)
    assert mark("trt") == NOT_RUN
    monkeypatch.setitem(PROOFS, "trt", "visit.json")
    assert mark("trt") == ""


def state(path: str) -> str:
    """What the page for users says of a path."""
    proof = PROOFS[path]
    return f"experimental: {NOT_RUN}" if proof is None else f"proven: `bench/results/{proof}`"


def test_the_page_says_what_the_marks_say() -> None:
    page = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    section = page.partition("## What is experimental")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.-]+)` \| [^|]+ \| ([^|]+) \|$", section, re.MULTILINE)
    assert dict(rows) == {path: state(path) for path in PROOFS}
    assert ("Not yet run on a GPU" in page) == (None in PROOFS.values())


def test_the_readme_says_what_the_marks_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("trt", "trt-rtx"):
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert (NOT_RUN in row) == bool(mark(name)), row
    assert ("Nothing has run on a GPU" in text) == (not any(PROOFS.values()))
