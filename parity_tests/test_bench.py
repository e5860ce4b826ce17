"""What `ettin-bench` measures with."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support import run

from ettin.artifacts.errors import InputError, UsageError
from ettin.bench.beir import read_beir
from ettin.bench.cli import command
from ettin.bench.contest import PEERS, Contest, Contestant, contestants, result
from ettin.bench.cpu import ISAS, NOTES
from ettin.bench.machine import write_result
from ettin.bench.profile import peak_gops, profiled
from ettin.bench.quality import Quality, change
from ettin.bench.tables import filled
from ettin.bench.texts import pairs_to_score
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import load
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime
from ettin.runtimes.tokenizer import PairTokenizer


def test_natural_pairs_repeat_and_filled_pairs_are_full() -> None:
    assert len(pairs_to_score(None, 500)) == 500
    filled = pairs_to_score(None, 3, fill_tokens=1000)
    tokenizer = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
    assert [len(ids) for ids in tokenizer.pairs(filled, 1000)] == [1000] * 3
    assert len({document for _, document in filled}) == 3


def test_own_text_is_as_long_as_natural_questions() -> None:
    words = sorted(len(document.split()) for _, document in pairs_to_score(None, 1000))
    assert words[0] >= 24 and words[-1] <= 340
    assert words[500] == pytest.approx(114, abs=2) and sum(words) / 1000 == pytest.approx(127.7, abs=0.5)
    assert pairs_to_score(None, 50) == pairs_to_score(None, 50)


def quality_of(*values: float) -> Quality:
    by_query = {f"q{at}": value for at, value in enumerate(values)}
    return Quality(float(np.mean(values)), 0.0, 0.0, by_query, np.zeros(len(values), np.float32), 1.0)


def test_bootstrap_interval_is_paired() -> None:
    spread = np.random.default_rng(1).uniform(0, 1, 200)
    moved, low, high = change(quality_of(*(spread - 0.01)), quality_of(*spread).by_query)
    assert moved == pytest.approx(-0.01) and low == pytest.approx(-0.01) and high == pytest.approx(-0.01)
    noise = np.random.default_rng(2).normal(0, 0.05, 200)
    moved, low, high = change(quality_of(*(spread + noise)), quality_of(*spread).by_query)
    assert moved == pytest.approx(noise.mean()) and low < moved < high
    assert high - low == pytest.approx(2 * 1.96 * noise.std() / 200**0.5, rel=0.1)
    assert change(quality_of(0.5, 1.0), {"q0": 0.5, "q1": 1.0}) == (0.0, 0.0, 0.0)


def test_peers_need_a_name_and_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown peer 'st', expected some of: st-fp32, "):
        contestants([], {}, tmp_path, ["st"])
    with pytest.raises(UsageError, match="--checkpoint DIR"):
        contestants([], {}, None, ["st-fp32"])
    assert set(ISAS) == set(NOTES) and all(len(peer) > 1 for peer in PEERS.values())


def test_figures_of_a_contestant() -> None:
    reference = Contestant("st-fp32", "cross-encoder", [], scores=[1.0, 2.0, 4.0])
    entry = Contestant(
        "ours", "artifact", [], passes_s=[2.0, 1.0, 4.0], latencies_s=[0.2, 0.1, 0.3], scores=[1.0, 2.5, 4.0]
    )
    figures = result(entry, 100, reference)
    assert figures["pairs_per_s"] == 50 and figures["pairs_per_s_best"] == 100 and figures["latency_p50_ms"] == 200
    assert figures["max_abs_error"] == 0.5 and figures["spearman"] == 1 and figures["nan"] == 0
    entry.scores[0] = float("nan")
    figures = result(entry, 100, reference)
    assert figures["nan"] == 1 and "max_abs_error" not in figures
    entry.problem = "died with signal 8"
    assert result(entry, 100, reference) == {"name": "ours", "problem": "died with signal 8"}


def test_comparison_in_child_processes(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    artifact = demo_artifacts["openvino", "fp32"]
    settings = {"streams": 1, "cache_dir": str(tmp_path / "cache")}
    entries = contestants([artifact, tmp_path / "missing"], settings, DEMO_FOLDER, ["st-fp32"])
    pairs = pairs_to_score(None, 6)
    Contest(pairs, 3, 64, rounds=2, environment=ISAS["avx2_vnni"], warm=True).run(entries)
    ours, missing, peer = (result(entry, len(pairs), entries[2]) for entry in entries)
    assert len(ours["passes_s"]) == 2 and ours["max_abs_error"] < 1e-4 and "1 at a time" in ours["description"]
    assert list((tmp_path / "cache").rglob("*.blob"))
    assert "no manifest.json" in missing["problem"] and "SDPA, batch 32" in peer["description"]
    assert ours["padding_share"] == peer["padding_share"] == 0  # every pair fills its 64 tokens


def test_padding_is_counted(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    entries = contestants([demo_artifacts["onnx", "fp32"]], {"streams": 1}, DEMO_FOLDER, ["st-fp32"])
    pairs = [("a", "b"), ("a", "b " * 28), ("a", "b " * 30)]
    tokenizer = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
    short, middle, long = (len(ids) for ids in tokenizer.pairs(pairs, 64))
    for entry in entries:
        entry.batch = 2 * long if entry.kind == "artifact" else 2
    Contest(pairs, 2, 64, rounds=1).run(entries)
    for entry in entries:  # both of them cut [long, middle], [short]
        assert entry.facts["padding_share"] == pytest.approx((long - middle) / (2 * long + short)), entry


def test_profile_counts_the_linear_layers(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    with load(demo_artifacts["openvino", "int8"]) as runtime:
        assert isinstance(runtime, OpenVinoRuntime)
        parts = profiled(runtime, Batch.of([np.arange(5, 53, dtype=np.int32)] * 2, 0))
    # 7 layers of 7 linear layers: H 128, I 192; six for 96 tokens, the last for k and v, and for CLS the rest.
    weights = {"q": 1, "k": 1, "v": 1, "o": 1, "up": 1.5, "gate": 1.5, "down": 1.5}
    tokens, pairs = 96, 2
    expected = sum(2 * 128 * 128 * each * 6 * tokens for each in weights.values())
    expected += 2 * 128 * 128 * (2 * tokens + (1 + 1 + 4.5) * pairs)
    assert parts["int8 linear"].operations == pytest.approx(expected)
    assert parts["int8 linear"].nodes == 49 and parts["float linear"].nodes == 2 and "attention" in parts
    assert peak_gops("f32", int8=True) > 1 and peak_gops("f32", int8=False) > 1


def test_profile_command(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    done = run(
        "ettin-bench", "profile", demo_artifacts["openvino", "int8"], "--pairs", "2", "--json", "p.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "of peak" in done.stdout and "one thread" in done.stdout
    assert json.loads((tmp_path / "p.json").read_text())["result"]["peak_gops"]["int8 linear"] > 0
    refused = run("ettin-bench", "profile", demo_artifacts["onnx", "fp32"], cwd=tmp_path)
    assert refused.returncode == 1 and "only of 'openvino'" in refused.stderr


def write_set(folder: Path) -> None:
    topics = ["bees make honey and wax", "mars is the red planet", "water boils at a hundred degrees"]
    folder.mkdir()
    documents = [{"_id": f"d{at}", "title": "", "text": f"{topics[at % 3]} number {at}"} for at in range(30)]
    queries = [{"_id": f"q{at}", "text": text} for at, text in enumerate(topics)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels").mkdir()
    judged = "".join(f"q{at % 3}\td{at}\t1\n" for at in range(30))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def test_quality_command_compares_with_the_reference(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    write_set(tmp_path / "set")
    artifacts = [demo_artifacts["openvino", precision] for precision in ("fp32", "int8")]
    done = run("ettin-bench", "quality", *artifacts, "--data", "set", "--candidates", "10", "--reference", DEMO_FOLDER,
                 "--json", "q.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "change (95 %)" in done.stdout and "reference, fp32" in done.stdout
    reference, fp32, int8 = json.loads((tmp_path / "q.json").read_text())["result"]["rows"]
    assert fp32["ndcg10"] == reference["ndcg10"] and fp32["max_abs_error"] < 1e-4
    assert int8["ndcg10_change_95"][0] <= int8["ndcg10_change"] <= int8["ndcg10_change_95"][1]

    def again(*options: str) -> Result:
        words = ["quality", str(artifacts[1]), "--data", str(tmp_path / "set"), "--candidates", "10", *options,
                 "--reference", str(tmp_path / "q.json"), "--json", str(tmp_path / "again.json")]  # fmt: skip
        return CliRunner().invoke(command, words)

    assert again().exit_code == 0
    same, fast = json.loads((tmp_path / "again.json").read_text())["result"]["rows"]
    assert same == reference and "max_abs_error" not in fast
    assert all(fast[key] == int8[key] for key in ("ndcg10", "ndcg10_change", "ndcg10_change_95"))
    assert "q.json: no reference's quality on set/test with 3 queries" in str(again("--max-length", "64").exception)


def test_both_layouts_of_a_set(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    standard = read_beir(tmp_path / "set")
    (tmp_path / "set" / "qrels" / "test.tsv").rename(tmp_path / "set" / "qrels.tsv")
    assert read_beir(tmp_path / "set") == standard and len(standard.qrels) == 3
    with pytest.raises(InputError, match="split 'train'"):
        read_beir(tmp_path / "set", "train")


@pytest.mark.parametrize("page", ["README.md", "bench/results/README.md"])
def test_tables_are_what_the_results_say(page: str) -> None:
    file = Path(__file__).parents[1] / page
    assert filled(file.read_text(), file.parent) == file.read_text(), f"run: ettin-bench tables {page}"


def test_tables_command(tmp_path: Path) -> None:
    row = {
        "name": "st-fp32",
        "pairs_per_s": 100.0,
        "latency_p50_ms": 10.0,
        "peak_rss_mib": 5.0,
        "load_s": 1.0,
        "nan": 0,
    }
    ours = {**row, "name": "17m/openvino-int8", "pairs_per_s": 650.0, "max_abs_error": 0.12}
    result = {"candidates": 7, "contestants": [ours, row, {"name": "traced", "problem": "no kernel"}]}
    write_result(tmp_path / "r.json", "cpu", "ettin-bench cpu", result)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: cpu r.json -->\nstale\n<!-- end of table -->\nafter\n")
    stale = run("ettin-bench", "tables", "page.md", "--check", cwd=tmp_path)
    assert stale.returncode == 1 and "ettin-bench tables page.md" in stale.stderr
    assert run("ettin-bench", "tables", "page.md", cwd=tmp_path).returncode == 0
    text = page.read_text()
    assert "| `openvino` int8 " in text and "| 650" in text and "| 6.5 " in text and "no kernel" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert run("ettin-bench", "tables", "page.md", "--check", cwd=tmp_path).returncode == 0
    with pytest.raises(InputError, match="unknown table 'plot'"):
        filled("<!-- table: plot r.json -->\n<!-- end of table -->", tmp_path)
    with pytest.raises(InputError, match="table 'quality': its results lack 'data'"):
        filled("<!-- table: quality r.json -->\n<!-- end of table -->", tmp_path)
    with pytest.raises(InputError, match=r"missing\.json: not a result"):
        filled("<!-- table: cpu missing.json -->\n<!-- end of table -->", tmp_path)
