import os

import torch

# Kernels in the Triton language run in its interpreter where there is no GPU. Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from hub_stand_in import TOKEN, Hub, serving
from support import TINY, VARIANTS, shared_path, write_plain

from ettin.export.cli import main
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.reference import load_gold
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.export.source.weights import write_random_checkpoint
from ettin.runtimes.verify import Verification


@pytest.fixture
def shared() -> Callable[[str], Path]:
    return shared_path


@pytest.fixture
def export_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `ettin-export` in `tmp_path`, in this process: starting another takes seconds."""

    def export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = ["ettin-export", *map(str, arguments)]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        written = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), written.out, written.err)

    return export


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the hub, which its client in this process and in children talks to; the cache is empty."""
    cache = tmp_path / "hub-cache"
    with serving() as stand_in:
        variables = {
            "HF_ENDPOINT": stand_in.url,
            "HF_HUB_CACHE": str(cache),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        constants = {
            "ENDPOINT": stand_in.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, constant in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", constant)
        yield stand_in


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return read_checkpoint(DEMO_FOLDER, id="ettin-reranker-demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, TINY, seed=1)
    return read_checkpoint(folder, is_random=True)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Plain checkpoints with random weights, by the kinds in `support.PLAIN`."""

    @cache
    def checkpoint(kind: str) -> Checkpoint:
        return read_checkpoint(write_plain(tmp_path_factory.mktemp("plain"), kind), is_random=True)

    return checkpoint


@pytest.fixture(scope="session")
def demo_gold(demo: Checkpoint) -> Any:
    return load_gold(demo)


@pytest.fixture(scope="session")
def demo_artifacts(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every target and precision of the embedded checkpoint, exported by the product's own pipeline.

    Once for all processes of a run: `make test` has several. int8 is made apart from the rest, so that two processes
    share the work, and because it alone is verified on the many pairs that ranking quality needs.
    ETTIN_TEST_ARTIFACTS names a folder that keeps them for the next run, for work on tests that do not depend on how an
    artifact is exported.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    root = (tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.getbasetemp()) / "artifacts"
    root = Path(os.environ.get("ETTIN_TEST_ARTIFACTS", root))
    jobs = [Job(target, precision, root / f"{target}-{precision}") for target, precision in VARIANTS]
    groups = {
        "int8": [job for job in jobs if job.precision == "int8"],
        "others": [job for job in jobs if job.precision != "int8"],
    }
    for timeout_s in (0, -1):  # first what no other process makes, then wait for what another one makes
        for name, group in groups.items():
            with suppress(Timeout), FileLock(f"{root}-{name}.lock", timeout=timeout_s):
                export_missing(demo, group)
    return {(job.target, job.precision): job.output for job in jobs}


def export_missing(demo: Checkpoint, jobs: list[Job]) -> None:
    missing = [job for job in jobs if not job.output.exists()]  # an export publishes a whole artifact or nothing
    for job, found in Export(demo, Options(command="ettin-export --size demo --all")).run_all(missing):
        assert isinstance(found, Verification), (job, found)
