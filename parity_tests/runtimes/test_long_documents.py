"""Documents that do not fit: truncated, or in chunks; what was cut is said; scores that are kept."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ettin.artifacts.errors import InputError, UsageError
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import LongDocuments, Runtime, load
from ettin.runtimes.commands.rerank import command
from ettin.runtimes.long_documents import combined
from ettin.runtimes.request import Request
from ettin.runtimes.score_cache import ScoreCache
from ettin.runtimes.tokenizer import PairTokenizer

TOKENIZER = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
QUERY = "which planet is red"
LENGTH = 64
FILLER = "The harvest was poor that year, and nobody in the village spoke of it. "
LONG = FILLER * 12 + "Mars is called the red planet. " + FILLER * 12


@pytest.fixture(scope="module")
def runtime(demo_artifacts: dict[tuple[str, str], Path]) -> Iterator[Runtime]:
    with load(demo_artifacts["onnx", "fp32"], max_length=LENGTH) as loaded:
        yield loaded


def side(ids: np.ndarray) -> list[int]:
    """The document's ids in a pair."""
    first, second = np.flatnonzero(ids == ids[-1])
    return ids[first + 1 : second].tolist()


@given(
    st.integers(3, 90),
    st.integers(0, 40),
    st.integers(0, 60),
    st.integers(0, 300),
    st.one_of(st.none(), st.integers(1, 400)),
)
@settings(max_examples=300, deadline=None)
def test_chunks_hold_every_token(length: int, overlap: int, query: int, document: int, limit: int | None) -> None:
    texts = (" red" * query, " planet big" * (document // 2) + " Mars" * (document % 2))
    policy = LongDocuments("chunks", overlap, max_tokens_per_doc=limit)
    ((chunks, is_truncated),) = TOKENIZER.encoded([texts], length, policy)
    ((truncated,), _), *_ = TOKENIZER.encoded([texts], length, LongDocuments(max_tokens_per_doc=limit))
    assert chunks[0].tolist() == truncated.tolist()  # the first chunk is what truncation scores
    ids = TOKENIZER.texts([texts[1]])[texts[1]].tolist()
    wanted = ids[:limit]
    parts = [side(chunk) for chunk in chunks]
    size = len(parts[0])
    covered = list(parts[0])
    for part in parts[1:]:
        assert len(part) == size
        start = next(s for s in range(len(covered), -1, -1) if wanted[s : s + size] == part and s <= len(covered))
        covered += part[len(covered) - start :]
    query_cut = query > len(chunks[0]) - 3 - size
    if size or not wanted:
        assert covered == wanted
    assert is_truncated == (query_cut or len(ids) > len(wanted) or (size == 0 and bool(wanted)))
    assert len(chunks) <= 1 + 4 * len(wanted) / max(1, size)  # overlap costs a bounded factor


def test_starts_overlap_as_asked() -> None:
    policy = LongDocuments("chunks", chunk_overlap=3)
    assert policy.starts(10, 10) == [0]
    assert policy.starts(11, 10) == [0, 1]
    assert policy.starts(25, 10) == [0, 7, 14, 15]
    assert LongDocuments("chunks", chunk_overlap=99).starts(20, 10) == [0, 5, 10]
    assert LongDocuments().starts(20, 10) == [0]


def test_combined() -> None:
    logits = np.array([1, 5, 3, 4, 2, -1], np.float32)
    owners = np.array([0, 1, 2, 0, 0, 2])
    assert combined(logits, owners, 1).tolist() == [4, 5, 3]
    assert combined(logits, owners, 2).tolist() == [3, 5, 1]
    assert combined(logits, owners, 9).tolist() == pytest.approx([7 / 3, 5, 1])


@pytest.mark.parametrize("top", [1, 3])
def test_a_document_scores_as_its_best_chunks(runtime: Runtime, top: int) -> None:
    policy = LongDocuments("chunks", chunk_overlap=16, top_chunks=top)
    ((chunks, _),) = TOKENIZER.encoded([(QUERY, LONG)], LENGTH, policy)
    assert len(chunks) > 8
    alone = []
    for chunk in chunks:
        text = TOKENIZER._tokenizer.decode(side(chunk))
        (again,) = TOKENIZER.pairs([(QUERY, text)], LENGTH)
        assert again.tolist() == chunk.tolist()
        alone.append(float(runtime.predict((QUERY, text))))
    expected = float(np.mean(sorted(alone)[-top:]))
    short = "Venus is bright."
    scores = runtime.predict([(QUERY, short), (QUERY, LONG), (QUERY, "")], long_documents=policy)
    assert scores[1] == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(scores[[0, 2]], runtime.predict([(QUERY, short), (QUERY, "")]), atol=1e-5)
    assert scores[1] > runtime.predict((QUERY, LONG)) + 1  # truncation does not see what is relevant


def test_rank_finds_what_truncation_cuts(runtime: Runtime) -> None:
    documents = [FILLER * 40, LONG, "Venus"]
    truncated = runtime.rank(QUERY, documents)
    assert {hit["corpus_id"]: hit.get("truncated", False) for hit in truncated} == {0: True, 1: True, 2: False}
    whole = runtime.rank(QUERY, documents, long_documents="chunks")
    assert whole[0]["corpus_id"] == 1 and not any("truncated" in hit for hit in whole)


def test_max_tokens_per_doc(runtime: Runtime) -> None:
    ids = TOKENIZER.texts([LONG])[LONG][:10]
    text = TOKENIZER._tokenizer.decode(ids.tolist())
    policy = LongDocuments(max_tokens_per_doc=10)
    assert runtime.predict((QUERY, LONG), long_documents=policy) == pytest.approx(
        runtime.predict((QUERY, text)), abs=1e-5
    )
    hits = runtime.rank(QUERY, [LONG, text], long_documents=policy)
    assert {hit["corpus_id"]: hit.get("truncated", False) for hit in hits} == {0: True, 1: False}


def test_numbers_without_end(runtime: Runtime) -> None:
    policy = LongDocuments("chunks", 10**30, 10**30, 10**30)
    score = runtime.predict((QUERY, LONG), long_documents=policy)
    assert score == pytest.approx(runtime.predict((QUERY, LONG), long_documents=LongDocuments("chunks", 10**6, 10**6)))


def test_truncation_is_logged_once(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    runtime._has_warned = False
    with caplog.at_level(logging.WARNING, logger="ettin.predict"):
        runtime.predict([(QUERY, LONG)], max_length=32)  # the caller chose where to cut
        runtime.predict([(QUERY, LONG)], long_documents="chunks")
        assert not caplog.records
        for _ in range(2):
            runtime.predict([(QUERY, LONG), (QUERY, "Venus")])
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 2 pairs were truncated (max_length 64 tokens)")


def test_command(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    (tmp_path / "documents.txt").write_text(f"{FILLER * 40}\n{LONG}\nVenus\n")
    inputs = (demo_artifacts["onnx", "fp32"], tmp_path / "documents.txt")
    words = (*inputs, "--query", QUERY, "--max-length", LENGTH, "--json")

    def ranked(*options: object) -> list[dict[str, object]]:
        done = CliRunner().invoke(command, [str(word) for word in (*words, *options)])
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    assert {row["line"]: row.get("truncated", False) for row in ranked()} == {1: True, 2: True, 3: False}
    rows = ranked("--long-documents", "chunks", "--chunk-overlap", 16, "--top-chunks", 2)
    assert rows[0]["line"] == 2 and not any("truncated" in row for row in rows)
    assert all(row.get("truncated", False) == (row["line"] != 3) for row in ranked("--max-tokens-per-doc", 5))


def test_page_has_the_figures_of_the_result() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "run.md").read_text()
    (file,) = (root / "bench" / "results" / "long-documents").glob("*.json")
    for name, row in json.loads(file.read_text())["policies"].items():
        seconds = row.get("s_per_document")
        time = "the same" if seconds is None else f"{1000 * seconds:.0f} ms"
        line = f"| {100 * row['recall@1']:.0f} % | {row['ndcg@10']:.3f} | {time} |"
        assert f"| {name.replace(', 512', '')} {line}" in page, line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"long_documents": "cut"}, "unknown long_documents 'cut', expected one of: truncate, chunks"),
        ({"chunk_overlap": -1}, "chunk_overlap is -1, expected 0 or more"),
        ({"top_chunks": "0"}, "top_chunks is 0, expected 1 or more"),
        ({"max_tokens_per_doc": "ten"}, "max_tokens_per_doc is 'ten', expected a whole number"),
        ({"top_chunks": 2.5}, "top_chunks is 2.5, expected a whole number"),
        ({"top_chunks": True}, "top_chunks is True, expected a whole number"),
        ({"top_chunks": float("inf")}, "top_chunks is inf, expected a whole number"),
        ({"top_chunks": [1]}, "top_chunks is [1], expected a whole number"),
    ],
)
def test_bad_values_are_said(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as error:
        LongDocuments().updated(values)
    assert str(error.value) == message
    assert LongDocuments().updated({"top_chunks": "3", "threads": 2, "chunk_overlap": None}).top_chunks == 3


def test_many_chunks_share_the_scheduler(runtime: Runtime) -> None:
    """Chunks for many batches; every chunk is counted while it waits, and none is left."""
    policy = LongDocuments("chunks", chunk_overlap=0)
    document = "red planet " * 12_000
    future = runtime.scheduler.submit(Request([(QUERY, document)] * 2, LENGTH, long_documents=policy))
    seen = 0
    while not future.done():
        seen = max(seen, runtime.scheduler.waiting_pairs)
    scored = future.result()
    chunks = len(TOKENIZER.encoded([(QUERY, document)], LENGTH, policy)[0].chunks)
    assert chunks > 300 and seen > chunks and runtime.scheduler.waiting_pairs == 0
    assert scored.logits[0] == pytest.approx(scored.logits[1], abs=1e-5) and scored.tokens[0] > 24_000
    assert not scored.truncated.any() and scored.queue_s < scored.engine_s


def test_truncation_that_is_refused(runtime: Runtime) -> None:
    scheduler = runtime.scheduler
    whole = LongDocuments("chunks")
    assert scheduler.scored(Request([(QUERY, LONG)], LENGTH, refuse_truncated=True, long_documents=whole)).logits.size
    with pytest.raises(InputError, match="document 0 has, with its query, more than 64 tokens"):
        scheduler.scored(Request([(QUERY, LONG)], LENGTH, refuse_truncated=True))
    with pytest.raises(InputError, match="document 0 has more than 2 tokens"):
        scheduler.scored(
            Request(
                [(QUERY, "Mars is red")],
                LENGTH,
                refuse_truncated=True,
                long_documents=LongDocuments(max_tokens_per_doc=2),
            )
        )


# Scores that are kept.


def test_cache_answers_equal_pairs(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    with load(demo_artifacts["onnx", "fp32"], max_length=LENGTH) as runtime:
        runtime.scheduler.cache = cache = ScoreCache(100)
        pairs = [(QUERY, f"text {index}") for index in range(40)]
        first = runtime.predict(pairs)
        assert (cache.hits, cache.misses, runtime.scheduler.pairs) == (0, 40, 40)
        np.testing.assert_array_equal(runtime.predict(pairs[::-1]), first[::-1])
        assert (cache.hits, runtime.scheduler.pairs, runtime.scheduler.waiting_pairs) == (40, 40, 0)
        assert len(runtime.predict([*pairs, (QUERY, "new")])) == 41
        assert runtime.scheduler.pairs == 41
        future = runtime.scheduler.submit(Request(pairs, LENGTH))
        np.testing.assert_array_equal(future.result(10).logits, first)
        assert future.result().engine_s == 0
        whole = runtime.predict((QUERY, LONG), long_documents="chunks")
        assert whole != runtime.predict((QUERY, LONG))  # the same texts, but other tokens


def test_cache_is_bounded() -> None:
    cache, ids = ScoreCache(3), [np.array([index], np.int32) for index in range(5)]
    for index in range(3):
        cache.put(ids[index], float(index))
    assert cache.get(ids[0]) == 0.0
    cache.put(ids[3], 3.0)  # in place of 1, which was not used for the longest time
    cache.put(ids[4], float("nan"))
    assert [cache.get(each) for each in ids] == [0.0, None, 2.0, 3.0, None]
    off = ScoreCache()
    off.put(ids[0], 1.0)
    assert off.get(ids[0]) is None and (off.hits, off.misses) == (0, 0)
