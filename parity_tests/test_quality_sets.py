"""`ettin-bench quality` over several sets: run files, positives, NanoBEIR's form, means and their intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import DownloadError, InputError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.metrics import mean_metrics
from ettin.bench import cli_quality, hub_sets, published
from ettin.bench.beir import RetrievalSet
from ettin.bench.cli import command
from ettin.bench.first_stage import run_candidates
from ettin.bench.quality import mean_rows, paired_change, with_positives
from ettin.bench.texts import NATURAL_QUESTIONS, pairs_to_score
from ettin.runtimes import load

Artifacts = dict[tuple[str, str], Path]
DATA = RetrievalSet(
    "tiny/test", {f"d{at}": f"text {at}" for at in range(6)}, {"q1": "one", "q2": "two"},
    {"q1": {"d1": 1.0, "d5": 2.0, "d2": 0.0}, "q2": {"d0": 1.0}},
)  # fmt: skip


def beir(folder: Path, name: str, questions: int) -> Path:
    """A set of the project's own kind of text."""
    place = folder / name
    place.mkdir()
    documents = [f"The colour of planet {at} is number {at} of all." for at in range(12)]
    lines = [json.dumps({"_id": f"d{at}", "title": "", "text": text}) for at, text in enumerate(documents)]
    (place / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"q{at}", "text": f"colour of planet {at}"}) for at in range(questions)]
    (place / "queries.jsonl").write_text("\n".join(lines))
    rows = "".join(f"q{at}\td{at}\t1\n" for at in range(questions))
    (place / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return place


def test_run_file_ranks_by_score(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("q1 Q0 d3 1 0.5 x\nq1 Q0 d1 2 7 x\nq1 Q0 d0 3 -1 x\nq9 Q0 d0 1 1 x\n")
    assert run_candidates(DATA, file, 2) == {"q1": ["d1", "d3"]}
    file.write_text("q1 d3 0.5\n")
    with pytest.raises(InputError, match="not a run file, expected 'query Q0 document rank score name'"):
        run_candidates(DATA, file, 2)
    file.write_text("q1 Q0 elsewhere 1 1 x\n")
    with pytest.raises(InputError, match=r"ranks document 'elsewhere', which tiny/test does not have"):
        run_candidates(DATA, file, 2)
    file.write_text("q9 Q0 d0 1 1 x\n")
    with pytest.raises(InputError, match="ranks none of the queries of tiny/test"):
        run_candidates(DATA, file, 2)


def test_positives_are_added_once_and_only_what_is_relevant() -> None:
    found = with_positives(DATA, {"q1": ["d3", "d1"], "q2": ["d0"]})
    assert found == {"q1": ["d3", "d1", "d5"], "q2": ["d0"]}


def test_interval_of_a_mean_over_sets_draws_within_them() -> None:
    generator = np.random.default_rng(0)
    small, large = generator.normal(0.1, 0.05, 50), generator.normal(-0.1, 0.05, 5000)
    moved, low, high = paired_change([small, large])
    assert moved == pytest.approx((small.mean() + large.mean()) / 2)  # each set counts the same
    error = (small.var() / 50 + large.var() / 5000) ** 0.5 / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_means_over_sets() -> None:
    def row(name: str, values: list[float], **more: float) -> dict[str, Any]:
        mean = float(np.mean(values))
        by_query = {f"q{at}": value for at, value in enumerate(values)}
        return {"artifact": name, "ndcg10": mean, "map": mean, "mrr10": mean, "seconds": 1.0,
                "ndcg10_by_query": by_query, **more}  # fmt: skip

    against = {"ndcg10_change": 0.0, "max_abs_error": 0.5, "spearman": 1.0, "kendall": 1.0}
    first = {"data": "a", "rows": [row("reference, fp32", [0.5, 0.7]), row("x/int8", [0.4, 0.6], **against)]}
    more = {**against, "max_abs_error": 0.25, "spearman": 0.5}
    second = {"data": "b", "rows": [row("reference, fp32", [1.0]), row("x/int8", [0.9], **more)]}
    reference, ours = mean_rows([first, second])
    assert reference["ndcg10"] == pytest.approx(0.8) and "ndcg10_change" not in reference
    assert ours["ndcg10_change"] == pytest.approx(-0.1) and ours["max_abs_error"] == 0.5 and ours["spearman"] == 0.75
    assert ours["ndcg10_by_query"].keys() == {"a: q0", "a: q1", "b: q0"} and ours["seconds"] == 2


def test_several_sets_and_a_run_file(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    one, two = beir(tmp_path, "one", 4), beir(tmp_path, "two", 3)
    artifact = str(demo_artifacts["openvino", "fp32"])
    options = ["--candidates", "5", "--json", str(tmp_path / "q.json")]
    done = CliRunner().invoke(command, ["quality", artifact, "--data", str(one), "--data", str(two), *options])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "q.json").read_text())["result"]
    assert result["data"] == "one/test + two/test" and result["queries"] == 7 and len(result["sets"]) == 2
    parts = [each["rows"][0]["ndcg10"] for each in result["sets"]]
    assert result["rows"][0]["ndcg10"] == pytest.approx(np.mean(parts)) and "Spearman" not in done.output
    run = tmp_path / "run"
    run.write_text("q1 Q0 d1 1 2 x\nq1 Q0 d2 2 1 x\n")
    done = CliRunner().invoke(command, ["quality", artifact, "--data", str(one), "--run", str(run), *options])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "q.json").read_text())["result"]["queries"] == 1
    for wrong in (["--data", str(one), "--nanobeir"], [], ["--data", str(one), "--data", str(two), "--run", str(run)]):
        assert isinstance(CliRunner().invoke(command, ["quality", artifact, *wrong]).exception, UsageError)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's two datasets in the form that it holds them, in a folder."""
    duckdb = pytest.importorskip("duckdb")
    import huggingface_hub

    def put(name: str, select: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        duckdb.sql(f"copy ({select}) to '{file}' (format parquet)")

    put("pair/train-00000-of-00001.parquet", "select 'who?' as query, 'me' as answer union all select 'what?', 'it'")
    for split in (f"Nano{name}" for name in hub_sets.NANOBEIR):
        put(
            f"corpus/{split}-00000-of-00001.parquet",
            "select 'd' || n as _id, 'planet ' || n as text from range(30) r(n)",
        )
        put(
            f"queries/{split}-00000-of-00001.parquet",
            "select 'q' || n as _id, 'planet ' || n as text from range(3) r(n)",
        )
        put(
            f"qrels/{split}-00000-of-00001.parquet",
            "select 'q' || n as \"query-id\", 'd' || n as \"corpus-id\" from range(3) r(n)",
        )
        ranked = "select 'q' || n as \"query-id\", ['d9', 'd8', 'd0', 'd1', 'd7'] as \"corpus-ids\" from range(3) r(n)"
        put(f"bm25/{split}-00000-of-00001.parquet", ranked)
    names = [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.parquet")]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, repo_type: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, repo_type: str(tmp_path / name))
    return tmp_path


def test_text_from_the_hub(hub: Path) -> None:
    assert sorted(pairs_to_score(NATURAL_QUESTIONS, 2)) == [("what?", "it"), ("who?", "me")]
    data, ranked = hub_sets.nanobeir("SciFact")
    assert data.name == "NanoSciFact" and len(data.documents) == 30 and data.qrels["q1"] == {"d1": 1.0}
    assert ranked["q2"] == ["d9", "d8", "d0", "d1", "d7"]


def test_nanobeir_as_published(
    hub: Path, demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_quality, "_published", lambda path: 0.6746)
    artifact = str(demo_artifacts["openvino", "fp32"])
    options = ["--nanobeir", "--candidates", "4", "--json", str(tmp_path / "n.json")]
    done = CliRunner().invoke(command, ["quality", artifact, *options])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "n.json").read_text())["result"]
    assert result["data"] == "NanoBEIR" and len(result["sets"]) == 13 and result["always_rerank_positives"]
    assert result["rows"][0]["published_ndcg10"] == 0.6746 and "published" in done.output
    # 4 candidates and what they lack: the same as ranking these documents alone.
    with load(artifact) as runtime:
        rankings = []
        for at, documents in enumerate(
            (["d9", "d8", "d0", "d1"], ["d9", "d8", "d0", "d1"], ["d9", "d8", "d0", "d1", "d2"])
        ):
            scores = runtime.predict([(f"planet {at}", f"planet {each[1:]}") for each in documents])
            rankings.append([documents[place] for place in np.argsort(-scores, kind="stable")])
    expected = mean_metrics(rankings, [{f"d{at}": 1.0} for at in range(3)])
    assert result["rows"][0]["ndcg10"] == pytest.approx(expected["ndcg10"])


def test_hub_that_holds_something_else(hub: Path) -> None:
    for file in (hub / "bm25").iterdir():
        file.rename(file.with_name(file.name.replace("parquet", "json")))
    with pytest.raises(DownloadError, match=r"holds no bm25/NanoNope-\*\.parquet|holds no corpus"):
        hub_sets.nanobeir("Nope")


def test_published_means_are_the_released_weights_alone(
    demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:

    artifact = demo_artifacts["openvino", "fp32"]
    assert cli_quality._published(artifact) is None
    manifest = Manifest.read(artifact)
    source = manifest.source.model_copy(update={"id": "cross-encoder/ettin-reranker-68m-v1"})
    monkeypatch.setattr(Manifest, "read", lambda folder: manifest.model_copy(update={"source": source}))
    assert cli_quality._published(artifact) == published.NANOBEIR_NDCG10[2]


@pytest.mark.hub
def test_nanobeir_from_the_hub() -> None:
    data, ranked = hub_sets.nanobeir("SciFact")
    assert len(data.queries) == 50 and all(len(found) >= 100 for found in ranked.values())
    assert len(pairs_to_score(NATURAL_QUESTIONS, 1000)) == 1000


def test_parity_is_the_manifests(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts = [str(demo_artifacts[key]) for key in (("openvino", "int8"), ("onnx", "fp32"))]
    done = CliRunner().invoke(command, ["parity", *artifacts, "--json", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "p.json").read_text())["result"]["rows"]
    for row, path in zip(rows, artifacts, strict=True):
        proven = Manifest.read(Path(path)).parity
        assert row["max_abs_error"] == proven.max_abs_error and row["status"] == "verified" and row["size_mib"] > 1
    assert "`openvino`" in done.output and "int8" in done.output
