"""The examples run as their first lines say."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ettin.export.proof_pairs import natural_pairs

EXAMPLE = Path(__file__).parents[2] / "examples" / "retrieve_then_rerank.py"


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """The project's own passages, in BEIR form."""
    pairs = natural_pairs()
    documents = list(dict.fromkeys(pair.document for pair in pairs))
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    lines = [json.dumps({"_id": f"d{at}", "title": "", "text": text}) for at, text in enumerate(documents)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"q{at}", "text": text}) for at, text in enumerate(queries)]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    rows = [f"q{queries.index(pair.query)}\td{documents.index(pair.document)}\t1" for pair in pairs]
    (tmp_path / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *dict.fromkeys(rows)]))
    return tmp_path


def test_measured(collection: Path, demo_artifacts: dict[tuple[str, str], Path]) -> None:
    printed = run(collection, demo_artifacts["openvino", "int8"], "--queries", 5, "--candidates", 20)
    assert "retrieve " in printed and "rerank " in printed and printed.count("nDCG@10 0.") + printed.count("10 1.") == 2


def test_asked(collection: Path, demo_artifacts: dict[tuple[str, str], Path]) -> None:
    printed = run(collection, demo_artifacts["openvino", "int8"], "--ask", natural_pairs()[0].query)
    scores = [float(line.split()[0]) for line in printed.splitlines()[1:]]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)


def test_on_scifact(shared: Callable[[str], Path], demo_artifacts: dict[tuple[str, str], Path]) -> None:
    printed = run(shared("retrieval/scifact"), demo_artifacts["openvino", "int8"], "--queries", 2)
    assert "index 5183 documents" in printed
