"""`ettin-bench peers`: environments, who can take part, and what those say who can't."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import EttinError
from ettin.bench import peers
from ettin.bench.cli import command
from ettin.bench.tables import TABLES
from ettin.export.source.sizes import DEMO_FOLDER

Artifacts = dict[tuple[str, str], Path]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, peers.Peer]:
    """Peers that need nothing, or what is nowhere."""
    found = {
        "empty": peers.Peer("fastembed", "onnx", ()),
        "nowhere": peers.Peer("optimum", "onnx", ("no-such-package-anywhere",)),
    }
    monkeypatch.setattr(peers, "PEERS", found)
    return found


def test_environments_are_made_whole_or_not_at_all(tmp_path: Path, small: dict[str, peers.Peer]) -> None:
    problems = peers.make_environments(tmp_path, list(small))
    assert problems.keys() == {"nowhere"} and "no-such-package-anywhere" in problems["nowhere"]
    assert [each.name for each in tmp_path.iterdir()] == ["fastembed"]
    assert peers.python_of(tmp_path / "fastembed").exists()
    assert peers.installed_in(tmp_path, list(small)) == {"empty": []}
    mark = tmp_path / "fastembed" / "peer.json"
    before = mark.stat().st_mtime_ns
    peers.make_environments(tmp_path, ["empty"])
    assert mark.stat().st_mtime_ns == before  # kept


def test_this_project_goes_into_an_environment_with_its_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "own_source", lambda: "/a/checkout")
    assert peers._wanted("SELF[openvino]") == "/a/checkout[openvino]"
    monkeypatch.setattr(peers, "own_source", lambda: "ettin-export==0.1.0")
    assert peers._wanted("SELF[openvino]") == "ettin-export[openvino]==0.1.0"
    assert peers._wanted("torch").startswith("torch==2") and "+" not in peers._wanted("torch")


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every peer's environment is this one."""
    for peer in peers.PEERS.values():
        folder = tmp_path / "environments" / peer.environment
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "peer.json").write_text(json.dumps({"packages": [], "installed": ["x==1"]}))
    monkeypatch.setattr(peers, "python_of", lambda folder: Path(sys.executable))
    return tmp_path / "environments"


def test_those_who_cant_take_part_say_why(demo_artifacts: Artifacts, environments: Path, tmp_path: Path) -> None:
    options = ["--environments", str(environments), "--checkpoint", str(DEMO_FOLDER), "--pairs", "6", "--rounds", "1"]
    for name in ("sentence-transformers fp32", "fastembed", "FlashRank", "llama.cpp q8_0"):
        options += ["--peer", name]
    artifacts = [str(demo_artifacts["onnx", precision]) for precision in ("fp32", "int8")]
    done = CliRunner().invoke(command, ["peers", *artifacts, *options, "--json", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads((tmp_path / "p.json").read_text())["result"]
    rows = {row["name"]: row for row in result["contestants"]}
    assert rows["sentence-transformers fp32"]["pairs_per_s"] > 0 and rows["sentence-transformers fp32"]["nan"] == 0
    assert rows["fastembed, onnx-int8"]["problem"] == "ModuleNotFoundError: No module named 'fastembed'"
    assert "flashrank" in rows["FlashRank, onnx-fp32"]["problem"]
    assert rows["llama.cpp q8_0"]["problem"] == "runs 'transformers', of which none was named"
    table = TABLES["peers"]([result])
    assert [row[0] for row in table].count("llama.cpp q8_0") == 1 and result["environments"]["fastembed"] == ["x==1"]


def test_missing_environment_says_what_to_run(tmp_path: Path) -> None:
    with peers.peer_entries(["sentence-transformers fp32"], tmp_path, DEMO_FOLDER, []) as (entry,):
        assert entry.problem == f"{tmp_path / 'cross-encoder'}: no environment. Run: ettin-bench make-peers {tmp_path}"


def test_conversion_that_fails_is_a_reason(environments: Path, demo_artifacts: Artifacts) -> None:
    script = environments / "llama-cpp" / "src" / "x-1" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('Model ModernBert is not supported')")
    artifacts = [demo_artifacts["transformers", "fp32"]]
    with peers.peer_entries(["llama.cpp q8_0"], environments, None, artifacts) as (entry,):
        assert entry.problem == "Model ModernBert is not supported"


def test_unpacked_source_stays_inside(tmp_path: Path) -> None:
    with pytest.raises(EttinError):
        peers._unpack_source([sys.executable, "-m", "pip", "-q"], "no-such-package-anywhere", tmp_path / "src")
    assert not os.path.lexists(tmp_path / "src")
