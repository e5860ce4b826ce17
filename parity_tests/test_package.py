"""The package as a whole: layout, direction of imports, documents."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["artifacts", "runtimes", "export", "bench"]
TORCH_USERS = {"on_torch.py", "flash.py", "flash_graph.py", "fold.py", "torch_graph.py"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_folder_of_code_is_in_the_package() -> None:
    folders = {path.parent.relative_to(ROOT) for layer in LAYERS for path in sources(layer)}
    assert {f"ettin.{'.'.join(folder.parts)}" for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert {f"ettin.{'.'.join(folder.parts)}": folder.as_posix() for folder in folders} == PROJECT["tool"][
        "setuptools"
    ]["package-dir"]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for path in sources(layer):
        wrong = [name for name in imported(path) for other in above if name.startswith(f"ettin.{other}")]
        assert not wrong, (path, wrong)


@pytest.mark.parametrize("layer", ["artifacts", "runtimes"])
def test_no_torch_below_the_exporter(layer: str) -> None:
    for path in sources(layer):
        roots = {name.split(".")[0] for name in imported(path)}
        if path.name not in TORCH_USERS:
            assert not roots & {"torch", "transformers", "sentence_transformers", "safetensors"}, path


def test_modules_stay_small() -> None:
    for layer in LAYERS:
        for path in sources(layer):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 320, path


def test_embedded_checkpoint_stays_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "export" / "demo").rglob("*")) < 6 * 2**20


def test_nothing_names_a_machine_of_the_authors() -> None:
    for layer in [*LAYERS, "parity_tests"]:
        for path in sources(layer):
            assert "/work" + "/" not in path.read_text(encoding="utf-8"), path
