"""Scoring of tables and Parquet files; `interop/systems` runs them with the real Ray and Spark."""

import importlib.util
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import run

from ettin.artifacts.errors import EttinError, InputError, OutputError
from ettin.artifacts.manifest import Manifest
from ettin.export.proof_pairs import natural_pairs
from ettin.runtimes.clusters.parquet_files import ParquetJob, Part
from ettin.runtimes.clusters.tables import TableScorer
from ettin.runtimes.clusters.workers import process_runtime

PAIRS = [(pair.query, pair.document[:150]) for pair in natural_pairs()[:40]]
QUERIES, DOCUMENTS = (list(texts) for texts in zip(*PAIRS, strict=True))


@pytest.fixture(scope="module")
def artifact(demo_artifacts: dict[tuple[str, str], Path]) -> str:
    return str(demo_artifacts["openvino", "int8"])


def table(**more: Any) -> pa.Table:
    return pa.table({"id": range(40), "query": QUERIES, "document": DOCUMENTS, **more})


def expected(artifact: str, **settings: Any) -> Any:
    return process_runtime(artifact, **settings).predict(PAIRS)


def test_table(artifact: str) -> None:
    scorer: TableScorer = pickle.loads(pickle.dumps(TableScorer(artifact)))  # noqa: S301 (our own)
    scored = scorer(table())
    assert scored.schema == table().schema.append(pa.field("score", pa.float32()))
    assert scored.drop_columns("score") == table()
    np.testing.assert_allclose(scored["score"].to_numpy(), expected(artifact), atol=1e-5)
    assert scorer(table().slice(0, 0)).num_rows == 0
    large = pa.table({"q": pa.array(QUERIES, pa.large_string()), "d": DOCUMENTS})
    short = TableScorer(artifact, "q", "d", "logit", max_length=20)(large)["logit"].to_numpy()
    np.testing.assert_allclose(short, expected(artifact, max_length=20), atol=1e-5)
    assert abs(short - expected(artifact)).max() > 0.1


def test_rows_without_text_have_no_score(artifact: str) -> None:
    scored = TableScorer(artifact)(table(query=[None, *QUERIES[1:]], document=[*DOCUMENTS[:-1], None]))["score"]
    assert scored.is_null().to_pylist() == [True, *[False] * 38, True]
    np.testing.assert_allclose(scored.drop_null().to_numpy(), expected(artifact)[1:-1], atol=1e-5)
    nothing = TableScorer(artifact)(pa.table({"query": pa.nulls(3), "document": ["a", "b", "c"]}))["score"]
    assert nothing.null_count == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"question": ["a"], "document": ["b"]}, "expected one column 'query', found: question, document"),
        ({"query": [1], "document": ["b"]}, "column 'query' has the type int64, expected string"),
        ({"query": ["a"], "document": ["b"], "score": [1.0]}, "a column 'score' is already there"),
    ],
)
def test_tables_that_cant_be_scored(artifact: str, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TableScorer(artifact)(pa.table(content))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_runtime_for_each_process(artifact: str) -> None:
    """What a preloading server needs: the child of a process that has scored scores, too."""
    runtime = process_runtime(artifact, threads=1)
    scores = runtime.predict(PAIRS)
    assert process_runtime(artifact, threads=1) is runtime and process_runtime(artifact, threads=2) is not runtime
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=lambda: sender.send(process_runtime(artifact, threads=1).predict(PAIRS)))
    child.start()
    assert receiver.poll(60)
    np.testing.assert_allclose(receiver.recv(), scores, atol=1e-5)
    child.join(60)
    assert child.exitcode == 0


@pytest.fixture
def job(artifact: str, tmp_path: Path) -> ParquetJob:
    """Three files of 40 pairs, one of them in a folder of its own, beside what is no data."""
    (tmp_path / "pairs" / "day=2").mkdir(parents=True)
    for name in ("a.parquet", "b.parquet", "day=2/a.parquet"):
        pq.write_table(table().replace_schema_metadata({"of": name}), tmp_path / "pairs" / name)
    for name in ("_SUCCESS", ".hidden.parquet", "README.md"):
        (tmp_path / "pairs" / name).write_text("no data")
    return job_of(artifact, tmp_path)


def job_of(artifact: str, folder: Path, source: str = "pairs", target: str = "scored", **settings: Any) -> ParquetJob:
    digest = Manifest.read(Path(artifact)).digest
    return ParquetJob(TableScorer(artifact, **settings), digest, str(folder / source), str(folder / target))


def test_a_folder(job: ParquetJob, artifact: str, tmp_path: Path) -> None:
    parts, done_pairs = job.parts()
    assert len(parts) == 3 and {part.pairs for part in parts} == {40} and done_pairs == 0
    for part in pickle.loads(pickle.dumps(parts)):  # noqa: S301 (our own)
        outcome = job.score(part)
        assert (outcome.pairs, outcome.null_rows, outcome.error) == (40, 0, None)
    names = sorted(str(path.relative_to(tmp_path / "scored")) for path in (tmp_path / "scored").rglob("*.*"))
    assert names == ["a.parquet", "b.parquet", "day=2/a.parquet"]
    scored = pq.ParquetFile(tmp_path / "scored" / "day=2" / "a.parquet").read()
    assert scored.drop_columns("score") == table() and scored.schema.metadata[b"of"] == b"day=2/a.parquet"
    np.testing.assert_allclose(scored["score"].to_numpy(), expected(artifact), atol=1e-5)
    assert job.parts() == ([], 120)


def test_one_file_of_many_row_groups(artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ettin.runtimes.clusters.parquet_files._ROWS", 7)
    pq.write_table(table(query=[*QUERIES[:8], None, *QUERIES[9:]]), tmp_path / "one.parquet", row_group_size=9)
    job = job_of(artifact, tmp_path, "one.parquet")
    ((part,), _) = job.parts()
    assert str(job.score(part)) == f"{part.source}: 1 rows lack a text, the first is row 8; no scores there"
    scored = pq.read_table(tmp_path / "scored" / "one.parquet")
    assert scored["id"].to_pylist() == list(range(40)) and scored["score"].null_count == 1
    assert job.parts() == ([], 40)


def test_a_run_that_was_killed_goes_on(job: ParquetJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second, third), _ = job.parts()
    job.score(first)
    written = (tmp_path / "scored" / "a.parquet").stat().st_mtime_ns

    def die(*_: Any) -> None:
        raise KeyboardInterrupt  # nothing is tidied up, as after a kill

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ettin.runtimes.clusters.parquet_files.replace", die)
        job.score(second)
    assert len(list((tmp_path / "scored").glob(".b.parquet.partial-*"))) == 1
    assert not (tmp_path / "scored" / "b.parquet").exists()
    assert job.parts() == ([second, third], 40)
    assert not list((tmp_path / "scored").glob(".*"))
    job.score(second)
    job.score(second)  # by another worker, because the first one seemed lost
    job.score(third)
    assert job.parts() == ([], 120) and (tmp_path / "scored" / "a.parquet").stat().st_mtime_ns == written


def test_scores_of_something_else_are_not_added_to(job: ParquetJob, artifact: str, tmp_path: Path) -> None:
    part = job.parts()[0][0]
    job.score(part)
    with pytest.raises(
        OutputError, match=r"a\.parquet: not the scores of .*a\.parquet by this artifact and these sett"
    ):
        job_of(artifact, tmp_path, max_length=20).parts()
    job_of(artifact, tmp_path, threads=1).parts()
    job.digest = "0" * 64
    with pytest.raises(OutputError, match="not the scores of"):
        job.parts()
    job = job_of(artifact, tmp_path)
    scored = pq.ParquetFile(tmp_path / "scored" / "a.parquet").read()
    pq.write_table(scored.slice(1), tmp_path / "scored" / "a.parquet")
    with pytest.raises(OutputError, match="not the scores of"):
        job.parts()
    (tmp_path / "scored" / "a.parquet").write_bytes((tmp_path / "scored" / "a.parquet").read_bytes()[:-9])
    with pytest.raises(OutputError, match="not the scores of"):
        job.parts()
    pq.write_table(table(), tmp_path / "scored" / "a.parquet")
    with pytest.raises(OutputError, match="not the scores of"):
        job.parts()


def test_an_output_in_the_input_is_refused(job: ParquetJob, artifact: str, tmp_path: Path) -> None:
    for source, target in (("pairs", "pairs"), ("pairs", "pairs/scored"), ("pairs/a.parquet", "pairs")):
        with pytest.raises(OutputError, match="Choose a folder elsewhere"):
            job_of(artifact, tmp_path, source, target).parts()
    assert len(job_of(artifact, tmp_path, "pairs", "pairs-scored").parts()[0]) == 3


def test_inputs_that_are_none(job: ParquetJob, artifact: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: no Parquet files"):
        job_of(artifact, tmp_path, "missing").parts()
    with pytest.raises(InputError, match="ftp://host/pairs: no such place"):
        ParquetJob(job.scorer, job.digest, "ftp://host/pairs", job.target).parts()
    pq.write_table(pa.table({"query": [1], "document": ["b"]}), tmp_path / "pairs" / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: column 'query' has the type int64"):
        job.parts()
    (tmp_path / "pairs" / "c.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(InputError, match=r"c\.parquet: "):
        job.parts()


def test_a_file_that_goes_wrong_is_named_and_leaves_nothing(job: ParquetJob, tmp_path: Path) -> None:
    part = job.parts()[0][0]
    content = bytearray(Path(part.source).read_bytes())
    content[4:400] = os.urandom(396)  # pages; the footer stays
    Path(part.source).write_bytes(content)
    outcome = job.score(part)
    assert outcome.error and str(outcome).startswith(f"{part.source}: not scored: ") and "\n" not in str(outcome)
    assert not (tmp_path / "scored" / "a.parquet").exists()
    gone = job.score(Part(str(tmp_path / "gone.parquet"), part.target, 40, 1))
    assert gone.error and "gone.parquet" in gone.error


def test_command_says_what_it_needs(artifact: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    done = run("ettin-score", artifact, "pairs", "scored", cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == 'error: ettin-score needs ray, which is not installed. Run: pip install "ettin-export[ray]"\n'


def test_errors_of_the_family_only(artifact: str) -> None:
    with pytest.raises(EttinError, match="this is not an artifact"):
        TableScorer(os.path.dirname(artifact))(table())  # noqa: PTH120


def test_another_artifact_in_a_worker_is_an_error(job: ParquetJob, tmp_path: Path) -> None:
    """It was replaced after the run began, or a worker found another one under the same hub id."""
    part = job.parts()[0][0]
    job.digest = "0" * 64
    outcome = job.score(part)
    assert outcome.error and "another artifact" in outcome.error and not list((tmp_path / "scored").rglob("*.*"))


def test_a_file_that_fails_leaves_no_part(job: ParquetJob, tmp_path: Path) -> None:
    wrong = pa.table({"query": pa.array([b"\xff"]).cast(pa.string(), safe=False), "document": ["a"]})
    pq.write_table(wrong, tmp_path / "pairs" / "a.parquet")
    assert job.score(job.parts()[0][0]).error
    assert not list((tmp_path / "scored").rglob("*.*"))


def test_a_worker_in_another_folder_finds_the_artifact(artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(artifact)
    monkeypatch.chdir(path.parent)
    scorer = TableScorer(path.name)
    monkeypatch.chdir("/")
    assert scorer.artifact == artifact
    assert TableScorer("org/name@main").artifact == "org/name@main"


def test_threads_of_a_process_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def slow(artifact: str) -> object:
        loaded.append(artifact)
        time.sleep(0.1)
        return object()

    monkeypatch.setattr("ettin.runtimes.clusters.workers.load", slow)
    with ThreadPoolExecutor(4) as pool:
        runtimes = set(pool.map(process_runtime, ["of threads"] * 4))
    assert loaded == ["of threads"] and len(runtimes) == 1
