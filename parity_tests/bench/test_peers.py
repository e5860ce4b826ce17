"""What runs instead of an artifact: environments, who can take part, and what those say who can't."""

import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from ettin.artifacts.errors import EttinError
from ettin.bench import peers
from ettin.bench.contest import Contest, Contestant, figures
from ettin.bench.contestants import KINDS
from ettin.export.source.sizes import DEMO_FOLDER

Artifacts = dict[tuple[str, str], Path]


def test_environments_are_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EttinError, match="no-such-package-anywhere"):
        peers.make_environment(("no-such-package-anywhere",), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere" / "packages.json").exists()
    # Without pip, whose installation takes seconds.
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: venv.EnvBuilder().create(folder))
    peers.make_environment((), tmp_path / "empty")
    assert peers.python_of(tmp_path / "empty").exists() and (tmp_path / "empty" / "packages.json").read_text() == "[]"


def test_this_project_goes_into_an_environment_with_its_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "own_source", lambda: "/a/checkout")
    assert peers._requirement("SELF[openvino]") == "/a/checkout[openvino]"
    monkeypatch.setattr(peers, "own_source", lambda: "ettin-export==0.1.0")
    assert peers._requirement("SELF[openvino]") == "ettin-export[openvino]==0.1.0"
    assert peers._requirement("torch").startswith("torch==2") and "+" not in peers._requirement("torch")


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every peer's environment is this one."""
    for name in peers.PEERS:
        (tmp_path / "environments" / name).mkdir(parents=True)
        (tmp_path / "environments" / name / "packages.json").write_text("[]")
    monkeypatch.setattr(peers, "python_of", lambda folder: Path(sys.executable))
    return tmp_path / "environments"


def test_those_who_cant_take_part_say_why(demo_artifacts: Artifacts, environments: Path) -> None:
    artifacts = [demo_artifacts["onnx", precision] for precision in ("fp32", "int8")]
    names = ["st-bf16", "fastembed", "optimum", "llama.cpp"]
    with peers.peer_entries(names, DEMO_FOLDER, artifacts, environments, "cpu") as entries:
        Contest([("a", "b")] * 2, 1, 64, rounds=1).run(entries)
    by_name = {entry.name: entry for entry in entries}
    assert by_name["st-bf16"].problem is None and len(by_name["st-bf16"].scores) == 2
    assert by_name["fastembed, onnx-int8"].arguments[1] == "onnx/model_quantized.onnx"
    assert by_name["fastembed, onnx-int8"].problem == "ModuleNotFoundError: No module named 'fastembed'"
    assert "optimum" in str(by_name["optimum, onnx-fp32"].problem)
    assert by_name["llama.cpp"].problem == "runs 'transformers', of which there is none among the artifacts"


def test_environment_that_cant_be_made_is_a_reason(
    demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(packages: Sequence[str], folder: Path) -> None:
        raise EttinError(f"pip found no {packages[0]}")

    peer = peers.Peer("fastembed", ("{entry}",), source="onnx", packages=("no-such-package-anywhere",))
    monkeypatch.setitem(peers.PEERS, "fastembed", peer)
    monkeypatch.setattr(peers, "make_environment", fails)
    artifacts = [demo_artifacts["onnx", "fp32"]]
    with peers.peer_entries(["fastembed"], None, artifacts, tmp_path, "cpu") as (entry,):
        assert "pip found no no-such-package-anywhere" in str(entry.problem)


def test_conversion_that_fails_is_a_reason(environments: Path, demo_artifacts: Artifacts) -> None:
    script = environments / "llama.cpp" / "src" / "x-1" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('Model ModernBert is not supported')")
    artifacts = [demo_artifacts["transformers", "fp32"]]
    with peers.peer_entries(["llama.cpp"], None, artifacts, environments, "cpu") as (entry,):
        assert entry.problem == "Model ModernBert is not supported"


def test_every_peer_is_a_kind_of_contestant() -> None:
    assert {peer.kind for peer in peers.PEERS.values()} | {"artifact", "imported"} == KINDS.keys()


def test_direct_route_to_openvino(demo_artifacts: Artifacts) -> None:
    """The traced model scores a batch of equal lengths as the artifact does."""
    pairs = [("red planet", "Mars is the red planet"), ("red planet", "Venus is the hot planet")]
    with peers.peer_entries(["traced-f32"], DEMO_FOLDER, [], None, "cpu") as (traced,):
        ours = Contestant("a/ours", "artifact", [str(demo_artifacts["openvino", "fp32"]), "{}"])
        Contest(pairs, 1, 64, rounds=1).run([traced, ours])
    assert traced.problem is None
    assert figures(traced, 2, ours)["max_abs_error"] < 1e-3
