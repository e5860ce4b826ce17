"""What several test files use."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ettin.artifacts.files import list_files
from ettin.artifacts.manifest import _digest
from ettin.artifacts.targets import registered_targets
from ettin.graph import ModelShape

SHARED = Path(__file__).parents[3] / "shared" / "data"
COMMANDS = Path(sys.executable).parent
# What any machine can run.
_RUNNABLE = [target for target in registered_targets() if not target.is_compiled]
VARIANTS = [(target.name, precision) for target in _RUNNABLE for precision in target.precisions]

# A shape that is tiny and unlike the released ones: another window, two RoPE bases, a local last layer, 3 heads of 32.
TINY = ModelShape(
    vocab_size=8192,
    hidden_size=96,
    intermediate_size=80,
    num_heads=3,
    global_layers=(True, False, False, True, False),
    window_tokens=24,
    rope_theta_global=160_000.0,
    rope_theta_local=20_000.0,
    norm_eps=1e-5,
    head_norm_eps=1e-5,
    max_tokens=3000,
    pad_token_id=8190,
)


def shared_path(name: str) -> Path:
    """A file of the reference data, which is not part of this repository."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the reference data ../shared/data/{name}")
    return path


def run(*arguments: str | Path, cwd: Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours, in a process of its own."""
    command = [str(COMMANDS / arguments[0]), *map(str, arguments[1:])]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=stdin, env=variables, check=False)


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Returns when a condition holds; fails if it takes too long, so that a test ends."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def in_a_child(code: str, artifact: Path, environment: dict[str, str] | None = None) -> str:
    """What a fresh process prints; OpenVINO can die instead of raising."""
    program = f"import sys\nfrom ettin.runtimes import load\n{code}"
    command = [sys.executable, "-c", program, str(artifact)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert child.returncode == 0, (child.returncode, child.stderr)
    return child.stdout


def reseal(folder: Path) -> None:
    """Lists the files anew, as a program that knows the format could."""
    rewrite(folder, lambda content: content.update(files=[each.model_dump() for each in list_files(folder)]))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Edits the manifest; signed, as a program that knows the format could."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content.pop("manifest_sha256", None)
    if sign:
        content["manifest_sha256"] = _digest(content)
    path.write_text(json.dumps(content))
