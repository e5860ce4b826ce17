"""The package as a whole: layout, direction of imports, documents."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["artifacts", "graph", "runtimes", "export", "bench", "gpu"]
TORCH_USERS = {"on_torch.py", "fold.py", "torch_ops.py"}
PROGRAMS = {Path("bench/pretend_cpu")}  # run from a checkout, in no package
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def module_name(path: Path) -> str:
    return "ettin." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for layer in LAYERS for path in sources(layer)}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, or names in a string as an entry point does (docstrings aside)."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else str(node.module))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            names |= set(re.findall(r"\bettin\.[a-z_]+(?:\.[a-z_]+)*", node.value))
    return names


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every circle once, as the modules on it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside of functions and names in strings count, too."""
    edges = {module: imported(path) & (MODULES.keys() - {module}) for module, path in MODULES.items()}
    assert circles(edges) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]


def test_every_folder_of_code_is_in_the_package() -> None:
    folders = {path.parent.relative_to(ROOT) for layer in LAYERS for path in sources(layer)} - PROGRAMS
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


@pytest.mark.parametrize("layer", ["artifacts", "graph", "runtimes"])
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


def test_functions_are_short() -> None:
    for layer in LAYERS:
        for path in sources(layer):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    assert lines <= 60, f"{path}: {node.name} has {lines} lines, expected at most 60"


def test_no_module_has_the_name_of_a_standard_one() -> None:
    for layer in LAYERS:
        for path in sources(layer):
            assert path.stem not in sys.stdlib_module_names or path.stem == "__init__", path
