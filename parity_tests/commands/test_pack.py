"""`ettin-pack`: what is in the archive, and that it runs."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import MissingDependency, OutputError
from ettin.runtimes.commands import pack as module
from ettin.runtimes.commands.pack import command, requirements
from ettin.runtimes.loading import checked_manifest

Artifacts = dict[tuple[str, str], Path]


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Pip is not run: what it would be asked, and what builds are held to."""
    asked: list[list[str]] = []

    def run(words: list[str], variables: Mapping[str, str] | None = None) -> None:
        asked.append(words)
        if "wheel" in words:
            assert variables and variables["PIP_CONSTRAINT"] == variables["PIP_BUILD_CONSTRAINT"]
            held_to = Path(variables["PIP_CONSTRAINT"]).read_text().split()
            assert held_to == [f"openvino=={importlib.metadata.version('openvino')}"]
        folder = Path(words[words.index("-w" if "wheel" in words else "-d") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "some.whl").write_bytes(b"wheel")

    monkeypatch.setattr(module, "_run", run)
    return asked


def test_requirements_are_what_is_installed() -> None:
    project, *others = requirements({"openvino", "serve"})
    assert project == f"ettin-export[openvino,serve]=={importlib.metadata.version('ettin-export')}"
    pins = dict(line.split("==") for line in others)
    assert {"openvino", "fastapi", "starlette", "uvicorn", "tokenizers", "numpy", "pydantic-core"} <= pins.keys()
    assert not {"torch", "transformers", "pytest", "onnx", "sentence-transformers", "grpcio"} & pins.keys()
    assert all(importlib.metadata.version(name) == version for name, version in pins.items())


def test_a_target_of_another_package_brings_that_package() -> None:
    project, *others = requirements({"serve"}, ["pytest"])
    assert project.startswith("ettin-export[serve]==") and any(line.startswith("pytest==") for line in others)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == "openvino":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(MissingDependency, match=r'needs openvino.*pip install "ettin-export\[openvino,serve\]"'):
        requirements({"openvino", "serve"})


@pytest.mark.parametrize("wheels", [True, False])
def test_archive(demo_artifacts: Artifacts, tmp_path: Path, no_pip: list[list[str]], wheels: bool) -> None:
    archive = tmp_path / "reranker.tar.gz"
    artifact = str(demo_artifacts["openvino", "int8"])
    done = CliRunner().invoke(command, [artifact, "--output", str(archive), *(["--wheels"] if wheels else [])])
    assert done.exit_code == 0 and done.stdout.strip() == str(archive), done.output
    assert len(no_pip) == 1 + wheels and no_pip[0][-1] == str(Path(__file__).parents[2])
    with tarfile.open(archive) as tar:
        assert {entry.uid for entry in tar.getmembers()} == {0} and {entry.uname for entry in tar.getmembers()} == {""}
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "reranker"
    assert {path.name for path in folder.iterdir()} == {"README.md", "requirements.txt", "artifact", "wheels"}
    checked_manifest(folder / "artifact")
    assert ("pip download" in (folder / "README.md").read_text()) is not wheels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reranker", "reranker.tar.gz"]


def test_an_archive_is_not_lost(demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "reranker.tar.gz"
    archive.write_bytes(b"mine")
    artifact = str(demo_artifacts["onnx", "fp32"])
    done = CliRunner().invoke(command, [artifact, "--output", str(archive)])
    assert isinstance(done.exception, OutputError) and "exists, left as it is" in str(done.exception)

    def fail(*_: object) -> None:
        raise OutputError("pip could not bring the wheels: no network")

    monkeypatch.setattr(module, "_run", fail)
    done = CliRunner().invoke(command, [artifact, "--output", str(archive), "--force"])
    assert "no network" in str(done.exception)
    assert archive.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [archive]


@pytest.mark.slow
def test_packed_artifact_runs_without_a_network(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    """The README's lines, in a fresh environment; the index is asked for when packing only."""
    archive = tmp_path / "reranker.tar.gz"
    artifact = str(demo_artifacts["openvino", "int8"])
    done = CliRunner().invoke(command, [artifact, "--output", str(archive), "--wheels"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "reranker"
    environment = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "HOME": str(tmp_path)}

    def run(*words: str) -> str:
        return subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout

    run(sys.executable, "-m", "venv", "env")
    run("env/bin/pip", "install", "-q", "--no-index", "--find-links", "wheels", "-r", "requirements.txt")
    run("env/bin/ettin-verify", "artifact")
    assert "ettin-serve" in run("env/bin/ettin-serve", "--help")
    assert "torch" not in run("env/bin/pip", "list")
