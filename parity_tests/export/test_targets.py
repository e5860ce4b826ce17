"""Targets are descriptions that any package can register."""

import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import toy_target
from support import run

from ettin.artifacts import targets as targets_module
from ettin.artifacts.errors import UsageError
from ettin.artifacts.targets import DEVICES, GROUP, registered_targets, target_named, target_names
from ettin.export import reports


@pytest.fixture
def toy_package(tmp_path: Path) -> Path:
    """A folder with an installed package that registers the target `toy`."""
    folder = tmp_path / "site"
    metadata = folder / "toy_target-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(toy_target.__file__, folder)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-target\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[{GROUP}]\ntoy = toy_target:TOY\n[{DEVICES}]\ntoy.abacus = toy_target:TOY_ON_ABACUS\n"
    )
    return folder


def test_a_target_from_another_package(toy_package: Path, tmp_path: Path) -> None:
    """Export, verification, load and Triton repository, with no line about it in this project."""
    environment = {"PYTHONPATH": str(toy_package)}
    options = ("--target", "toy", "--max-length", "64")
    exported = run("ettin-export", "--size", "demo", *options, cwd=tmp_path, **environment)
    assert exported.returncode == 0, exported.stderr
    artifact = exported.stdout.strip()
    assert artifact == "ettin-reranker-demo/toy-fp32" and "from a toy file" in exported.stderr
    assert '# pip install "toy-target"\n' in (tmp_path / artifact / "README.md").read_text()
    verified = run("ettin-verify", artifact, cwd=tmp_path, **environment)
    assert verified.returncode == 0 and "ok (max |Δ|" in verified.stdout, verified.stderr
    ranked = run("ettin-rerank", artifact, "--query", "red planet", "-", cwd=tmp_path, stdin="Venus\nMars is red\n",
                 **environment)  # fmt: skip
    assert "Mars" in ranked.stdout.splitlines()[1], ranked.stderr
    pytest.importorskip("tritonclient", reason="needs the `triton` extra")
    served = run("ettin-triton", artifact, "--repository", "models", cwd=tmp_path, **environment)
    assert served.returncode == 0, served.stderr
    assert (tmp_path / "models" / "ettin-reranker-demo-toy-fp32" / "1" / "artifact" / "model.npz").is_file()
    listed = run("ettin-export", "--list", cwd=tmp_path, **environment)
    assert "torch, from NumPy's own file format" in listed.stdout
    _on_another_device(artifact, tmp_path, environment)
    without = run("ettin-verify", artifact, cwd=tmp_path)
    assert without.returncode == 1 and "unknown target 'toy', expected one of: onnx, openvino" in without.stderr


def _on_another_device(artifact: str, folder: Path, environment: dict[str, str]) -> None:
    """As the log, the lists, the doctor and the repository of Triton know it."""
    words = ("ettin-rerank", artifact, "--query", "red planet", "-", "--device")
    ranked = run(*words, "abacus", cwd=folder, stdin="Venus\nMars is red\n", **environment)
    assert "Mars" in ranked.stdout.splitlines()[1], ranked.stderr
    assert ranked.stderr.count("target 'toy' on device 'abacus' is experimental: not yet run with beads. Compare") == 1
    unknown = run(*words, "tpu", cwd=folder, stdin="Venus\n", **environment)
    assert unknown.returncode == 1
    assert unknown.stderr == "error: target 'toy' does not run on device 'tpu', expected one of: cpu, abacus\n"
    listed = run("ettin-export", "--list", cwd=folder, **environment)
    assert "cpu, abacus (experimental: not yet run with beads)" in listed.stdout
    doctor = run("ettin-export", "--doctor", cwd=folder, **environment)
    assert "target toy on abacus" in doctor.stdout and "torch installed; experimental: not yet run" in doctor.stdout
    served = run("ettin-triton", artifact, "--repository", "models", "--device", "tpu", cwd=folder, **environment)
    assert served.returncode == 1 and "'toy' does not run on device 'tpu', expected" in served.stderr


def test_the_doctor_names_the_package_of_each_extra() -> None:
    command = reports._install("ettin-export[onnx]", "ettin-export[export]", "toy-target", "ettin-export[onnx]")
    assert command == 'pip install "ettin-export[onnx,export]" "toy-target"' and reports._install() == ""


def test_the_targets_of_this_project() -> None:
    assert [name for name in target_names() if name != "toy"] == ["onnx", "openvino", "transformers", "trt", "trt-rtx"]
    for target in registered_targets():
        assert target.checked_precision(None) == target.precisions[0]
        with pytest.raises(UsageError, match=f"target '{target.name}' has no precision 'int4', expected one of: "):
            target.checked_precision("int4")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    entries: list[EntryPoint] = []
    monkeypatch.setattr(targets_module, "_entries", lambda group: [each for each in entries if each.group == group])
    for function in (targets_module._registered, targets_module._imported):
        function.cache_clear()
    yield entries  # type: ignore[misc]
    for function in (targets_module._registered, targets_module._imported):
        function.cache_clear()


def test_a_name_is_registered_once(registered: list[EntryPoint]) -> None:
    registered += [EntryPoint("toy", "toy_target:TOY", GROUP), EntryPoint("toy", "another:TOY", GROUP)]
    with pytest.raises(UsageError, match="target 'toy' is registered twice, as toy_target:TOY and as another:TOY"):
        target_names()


def test_metadata_of_an_earlier_installation_hides_nothing(tmp_path: Path) -> None:
    """As in a checkout: `python -c` looks into the current folder first."""
    (tmp_path / "ettin_export.egg-info").mkdir()
    (tmp_path / "ettin_export.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: ettin-export\n")
    code = "from ettin.artifacts.targets import target_names; print(*target_names())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("onnx openvino transformers")


def test_no_registered_target_is_a_broken_installation(registered: list[EntryPoint]) -> None:
    with pytest.raises(UsageError, match="no target is registered, .* Run: pip install --force-reinstall"):
        target_named("onnx")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("no_such_module:TOY", r"can't be imported \(ModuleNotFoundError"),
        ("toy_target:ToyWriter", "expected a Target named 'toy'"),
        ("ettin.export.targets:ONNX", "expected a Target named 'toy'"),
    ],
)
def test_a_broken_description_is_one_line(registered: list[EntryPoint], value: str, line: str) -> None:
    registered.append(EntryPoint("toy", value, GROUP))
    with pytest.raises(UsageError, match=line):
        target_named("toy")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (["no_such_module:ON"], r"device 'toy.abacus': .*can't be imported \(ModuleNotFoundError"),
        (["toy_target:TOY"], "device 'toy.abacus': toy_target:TOY is Target.*, expected a Component"),
        (
            ["toy_target:A", "toy_target:B"],
            "device 'toy.abacus' is registered twice, as toy_target:A and as toy_target:B",
        ),
    ],
)
def test_a_broken_device_is_one_line(registered: list[EntryPoint], values: list[str], line: str) -> None:
    registered.append(EntryPoint("toy", "toy_target:TOY", GROUP))
    registered += [EntryPoint("toy.abacus", value, DEVICES) for value in values]
    with pytest.raises(UsageError, match=line):
        target_named("toy").runtime_class("abacus")


def test_devices_of_another_target_are_not_its_own(registered: list[EntryPoint]) -> None:
    """Names of targets and devices have dashes, and one can begin as another does."""
    registered += [
        EntryPoint("toy", "toy_target:TOY", GROUP),
        EntryPoint("toy-2.abacus", "toy_target:TOY_ON_ABACUS", DEVICES),
        EntryPoint("toy.trt-rtx", "toy_target:TOY_ON_ABACUS", DEVICES),
    ]
    toy = target_named("toy")
    assert toy.devices == ["cpu", "trt-rtx"] and toy.component("trt-rtx") == toy_target.TOY_ON_ABACUS
    assert toy.component("cpu") == toy_target.TOY.runtime
