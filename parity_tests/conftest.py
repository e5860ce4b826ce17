import gc
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock, Timeout
from hub_stand_in import TOKEN, Hub, serving
from support import TINY, VARIANTS, shared_path, write_plain

from ettin.export.cli import main
from ettin.export.options import Job, Options
from ettin.export.proof_pairs import ProofPair
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes.verify import Verification, verify

if TYPE_CHECKING:  # These import torch, which the process that hands out the tests does not need.
    from ettin.export.reference import Gold
    from ettin.export.writer import Writer


# Kernels in the Triton language run in its interpreter where there is no GPU. Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = str(int(not Path("/dev/nvidiactl").exists()))


def pytest_collection_finish() -> None:
    gc.freeze()  # every export collects garbage, and would look at all that the tests imported: 0.3 s


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


@pytest.fixture(scope="session", autouse=True)
def reference_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exports in the processes of a run share what the reference computed: the same pairs, weights and settings.

    The first export that asks for them runs the reference; an export in a child process always does.
    """
    from ettin.export import pipeline
    from ettin.export.reference import score_gold

    folder = run_folder(tmp_path_factory) / "gold"
    folder.mkdir(exist_ok=True)

    def scored(
        checkpoint: Checkpoint, pairs: list[ProofPair], max_length: int, *, with_bf16: bool, with_activations: bool
    ) -> "Gold":
        digest = hashlib.sha256(repr((pairs, max_length, checkpoint.shape, checkpoint.activation)).encode())
        for path in sorted(path for path in checkpoint.folder.rglob("*") if path.is_file()):
            digest.update(str(path.relative_to(checkpoint.folder)).encode() + path.read_bytes())
        key = digest.hexdigest()
        with FileLock(folder / f"{key}.lock"):
            enough = [(bf16, act) for bf16 in {with_bf16, True} for act in {with_activations, True}]
            paths = [folder / f"{key}-{bf16}-{act}.pickle" for bf16, act in enough]
            stored = next(
                (path for path in paths if path.exists()), folder / f"{key}-{with_bf16}-{with_activations}.pickle"
            )
            if not stored.exists():
                gold = score_gold(checkpoint, pairs, max_length, with_bf16=with_bf16, with_activations=with_activations)
                stored.write_bytes(pickle.dumps(gold))
            gold = pickle.loads(stored.read_bytes())  # noqa: S301 (ours)
        cases = gold.cases if with_bf16 else [case.model_copy(update={"torch_bf16": None}) for case in gold.cases]
        return replace(gold, cases=cases, max_activation=gold.max_activation if with_activations else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "score_gold", scored)
        yield


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports verify in this process, by the same function, and not as other machines compute.

    For tests of what comes before and after; the artifacts of `demo_artifacts` are verified in all ways.
    """
    from ettin.export import pipeline
    from ettin.export.targets.to_openvino import OpenVinoWriter

    monkeypatch.setattr(pipeline, "verify_in_child", verify)
    monkeypatch.setattr(OpenVinoWriter, "environments", lambda self, precision: ())


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
    from ettin.export.source.weights import write_random_checkpoint

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
    from ettin.export.reference import load_gold

    return load_gold(demo)


@pytest.fixture(scope="session")
def demo_artifacts(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every target and precision of the embedded checkpoint, exported by the product's own pipeline.

    Once for all processes of a run: `make test` has several, which share the work by groups. int8 is a group because it
    alone is verified on the many pairs that ranking quality needs; another group proves its graph.
    ETTIN_TEST_ARTIFACTS names a folder that keeps them for the next run, for work on tests that do not depend on how an
    artifact is exported.
    """
    from ettin.export.targets.to_onnx import OnnxWriter
    from ettin.export.targets.to_openvino import OpenVinoWriter

    root = Path(os.environ.get("ETTIN_TEST_ARTIFACTS", run_folder(tmp_path_factory) / "artifacts"))
    jobs = [Job(target, precision, root / f"{target}-{precision}") for target, precision in VARIANTS]
    groups: dict[str, list[Job]] = {"others": [], "int8": [], "transformers": []}
    for job in jobs:
        groups[next((name for name in groups if name in (job.precision, job.target)), "others")].append(job)
    for timeout_s in (0, -1):  # first what no other process makes, then wait for what another one makes
        for name, group in groups.items():
            with suppress(Timeout), FileLock(f"{root}-{name}.lock", timeout=timeout_s):
                export_missing(demo, group, {OnnxWriter, OpenVinoWriter} if name == "int8" else set())
    return {(job.target, job.precision): job.output for job in jobs}


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run share."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    return tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.getbasetemp()


def export_missing(demo: Checkpoint, jobs: list[Job], proven: "set[type[Writer]]") -> None:
    from ettin.export.pipeline import Export

    options = Options(command="ettin-export --size demo --all")
    missing = [job for job in jobs if not job.output.exists()]  # an export publishes a whole artifact or nothing
    for job, found in Export(demo, options, _proven=proven).run_all(missing):
        assert isinstance(found, Verification), (job, found)
