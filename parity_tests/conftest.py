import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support import TINY, VARIANTS, shared_path

from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.reference import load_gold
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.export.source.weights import write_random_checkpoint


@pytest.fixture
def shared() -> Callable[[str], Path]:
    return shared_path


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return read_checkpoint(DEMO_FOLDER, id="ettin-reranker-demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, TINY, seed=1)
    return read_checkpoint(folder, is_random=True)


@pytest.fixture(scope="session")
def demo_gold(demo: Checkpoint) -> Any:
    return load_gold(demo)


@pytest.fixture(scope="session")
def demo_artifacts(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every target and precision of the embedded checkpoint, exported by the product's own pipeline.

    Once for all processes of a run: `make test` has several. ETTIN_TEST_ARTIFACTS names a folder that keeps them for
    the next run, for work on tests that do not depend on how an artifact is exported.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    root = (tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.getbasetemp()) / "artifacts"
    root = Path(os.environ.get("ETTIN_TEST_ARTIFACTS", root))
    jobs = [Job(target, precision, root / f"{target}-{precision}") for target, precision in VARIANTS]
    with FileLock(f"{root}.lock"):
        missing = [job for job in jobs if not job.output.exists()]  # an export publishes a whole artifact or nothing
        if missing:
            export = Export(demo, Options(command="ettin-export --size demo --all"))
            export.prepare(missing)
            for job in missing:
                assert export.run(job) is not None
    return {(job.target, job.precision): job.output for job in jobs}
