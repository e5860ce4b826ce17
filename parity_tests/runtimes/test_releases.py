"""The attention kernel, compiled once, in other releases of OpenVINO."""

import os
import sys
from pathlib import Path

import kernel_cases
import pytest
from support import run

from ettin.runtimes.engines.openvino_kernels import compiled

PROGRAM = Path(kernel_cases.__file__).with_name("kernel_in_openvino.py")


@pytest.mark.slow
@pytest.mark.parametrize("release", ["2026.2.0", "2026.2.1", "2026.3.1", "2026.4.0", "2026.4.1"])
def test_one_build_runs_in_several_releases(release: str, tmp_path: Path) -> None:
    packages = install(release, tmp_path)
    done = run(sys.executable, PROGRAM, cwd=tmp_path, PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{release} ") and int(done.stdout.split()[1]) >= 1


@pytest.mark.slow
def test_an_untested_release_is_not_used(tmp_path: Path) -> None:
    """It lacks functions that the kernel calls; OpenVINO's own attention runs there."""
    packages = install("2026.0.0", tmp_path)
    done = run(sys.executable, PROGRAM, cwd=tmp_path, PYTHONPATH=str(packages))
    assert done.returncode == 1
    assert done.stderr.strip() == "not tested with OpenVINO 2026.0, and compiled for another"


def install(release: str, folder: Path) -> Path:
    """A folder with that OpenVINO alone."""
    if compiled() is None:
        pytest.skip("the attention kernel was not compiled")
    packages = folder / "packages"
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, f"openvino=={release}")
    done = run(*command, cwd=folder, PIP_DISABLE_PIP_VERSION_CHECK="1", PATH=os.environ["PATH"])
    if done.returncode:
        pytest.skip(f"openvino {release} can't be downloaded: {done.stderr[-200:]}")
    return packages
