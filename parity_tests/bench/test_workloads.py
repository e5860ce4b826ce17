"""The texts that everything is measured on."""

import json
from pathlib import Path

import datasets
import pytest

from ettin.artifacts.errors import DownloadError, InputError
from ettin.bench.workloads import (
    NATURAL_QUESTIONS,
    bm25_candidates,
    pairs_to_score,
    read_beir,
)
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes.tokenizer import PairTokenizer

WORDS = ("alpha", "beta", "gamma")


def write_set(folder: Path) -> None:
    folder.mkdir()
    for name, key in (("corpus", "d"), ("queries", "q")):
        rows = [json.dumps({"_id": f"{key}{index}", "text": f"planet {WORDS[index]}"}) for index in range(3)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "qrels").mkdir()
    judged = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\nq1\td2\t0\n"
    (folder / "qrels" / "test.tsv").write_text(judged)


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


def test_both_layouts_of_a_set(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    standard = read_beir(tmp_path / "set")
    assert standard.qrels == {"q0": {"d0": 1}, "q1": {"d1": 2, "d2": 0}} and standard.queries.keys() == {"q0", "q1"}
    (tmp_path / "set" / "qrels" / "test.tsv").rename(tmp_path / "set" / "qrels.tsv")
    assert read_beir(tmp_path / "set") == standard
    with pytest.raises(InputError, match="split 'train'"):
        read_beir(tmp_path / "set", "train")


def test_pairs_of_a_set_and_of_json_lines(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    pairs = {("planet alpha", "planet alpha"), ("planet beta", "planet beta"),
             ("planet beta", "planet gamma")}  # fmt: skip
    assert set(pairs_to_score(tmp_path / "set", 3)) == pairs
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "document": "b"}\n{"query": "c", "document": "d"}\n')
    assert sorted(pairs_to_score(tmp_path / "pairs.jsonl", 4)) == [("a", "b")] * 2 + [("c", "d")] * 2
    with pytest.raises(InputError, match="not a retrieval set"):
        pairs_to_score(tmp_path / "missing", 4)


def test_natural_questions_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"query": ["who?", "what?"], "answer": ["me", "it"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: rows)
    assert sorted(pairs_to_score(NATURAL_QUESTIONS, 2)) == [("what?", "it"), ("who?", "me")]

    def fail(*_: str, split: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DownloadError, match=r"not fetched \(no route\). Or bring text: --data DIR"):
        pairs_to_score(NATURAL_QUESTIONS, 2)


@pytest.mark.hub
def test_natural_questions_from_the_hub() -> None:
    assert len(set(pairs_to_score(NATURAL_QUESTIONS, 1000))) == 1000


def test_bm25_finds_words_in_common(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    candidates = bm25_candidates(read_beir(tmp_path / "set"), 2)
    assert candidates["q1"][0] == "d1" and [len(keys) for keys in candidates.values()] == [2, 2]
    assert list(bm25_candidates(read_beir(tmp_path / "set"), 2, limit=1)) == ["q0"]
