"""The texts that everything is measured on: retrieval sets, Natural Questions, and the project's own passages."""

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from ettin.artifacts.errors import DownloadError, InputError, MissingDependency
from ettin.export.proof_pairs import read_pairs, read_passages

NATURAL_QUESTIONS = Path("nq")  # stands for the release's text, which comes from the hub
_QUESTIONS_ID = "sentence-transformers/natural-questions"

_CHARACTERS_PER_TOKEN = 12  # more than any text has, so that truncation decides the length

# Deciles of the words of a document in SQuAD v1.1 (dev, by question; the last one is the 99th percentile), which are
# about as long as the answers of Natural Questions. With a question: 43 to 450 tokens, 180 on average.
_WORDS = (24, 77, 89, 97, 105, 114, 127, 140, 157, 189, 340)


@dataclass(frozen=True)
class RetrievalSet:
    """A corpus with judged queries."""

    name: str  # of the folder, and the split
    documents: dict[str, str]  # text by id; a title stands before its text
    queries: dict[str, str]  # text by id; judged ones only
    qrels: dict[str, dict[str, int]]  # by query id, relevance by document id


def read_beir(folder: Path, split: str = "test") -> RetrievalSet:
    """Reads a retrieval set: corpus.jsonl[.gz], queries.jsonl[.gz], and qrels/SPLIT.tsv.

    Where there is no folder `qrels`, "test" is read from queries and qrels.tsv, "train" from queries-train and
    qrels-train.tsv.

    Raises:
        InputError: a file is missing or not in this form.
    """
    standard = folder / "qrels" / f"{split}.tsv"
    ending = "" if split == "test" or standard.exists() else f"-{split}"
    judgements = standard if standard.exists() else folder / f"qrels{ending}.tsv"
    try:
        documents = {
            row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _json_lines(folder, "corpus.jsonl")
        }
        queries = {row["_id"]: row["text"] for row in _json_lines(folder, f"queries{ending}.jsonl")}
        qrels: dict[str, dict[str, int]] = {}
        with judgements.open(encoding="utf-8", newline="") as lines:
            table = csv.reader(lines, delimiter="\t")
            next(table)
            for query, document, score in table:
                qrels.setdefault(query, {})[document] = int(float(score))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder}: not a retrieval set in BEIR form, split '{split}' ({error})") from None
    judged = {key: text for key, text in queries.items() if key in qrels}
    return RetrievalSet(f"{folder.resolve().name}/{split}", documents, judged, qrels)


def _json_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    plain = folder / name
    with plain.open("rb") if plain.exists() else gzip.open(folder / f"{name}.gz") as lines:
        for line in lines:
            yield json.loads(line)


def bm25_candidates(data: RetrievalSet, count: int, limit: int | None = None) -> dict[str, list[str]]:
    """The `count` best documents of each query by BM25, best first; of the first `limit` queries."""
    import bm25s

    ids = list(data.documents)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(data.documents.values()), show_progress=False), show_progress=False)
    keys = list(data.queries)[:limit]
    tokens = bm25s.tokenize([data.queries[key] for key in keys], show_progress=False)
    rows, _ = index.retrieve(tokens, k=min(count, len(ids)), show_progress=False)
    return {key: [ids[index] for index in row] for key, row in zip(keys, rows.tolist(), strict=True)}


def text_name(data: Path | None) -> str:
    """What a result calls the text."""
    return data.name if data else "generated"


def pairs_to_score(data: Path | None, count: int, fill_tokens: int | None = None) -> list[tuple[str, str]]:
    """Query–document pairs in a fixed random order, repeated until there are enough.

    Args:
        data: a retrieval set in BEIR form, whose judged pairs are taken; JSON lines with "query" and "document";
            `NATURAL_QUESTIONS`; None: the project's own passages, with lengths like those of Natural Questions.
        count: number of pairs.
        fill_tokens: documents are joined until each pair has at least this many tokens; None: natural lengths.
    """
    pairs = _generated(count) if data is None else _read(data)
    if data is not None:
        random.Random(0).shuffle(pairs)  # noqa: S311
    chosen = (pairs * (-(-count // len(pairs))))[:count]
    if fill_tokens is None:
        return chosen
    documents, characters = [document for _, document in pairs], fill_tokens * _CHARACTERS_PER_TOKEN
    return [(query, _joined(documents, index, characters)) for index, (query, _) in enumerate(chosen)]


def _read(data: Path) -> list[tuple[str, str]]:
    if data.is_file():
        return [(pair.query, pair.document) for pair in read_pairs(data)]
    if data == NATURAL_QUESTIONS and not data.is_dir():
        return _natural_questions()
    rows = read_beir(data)
    return [(rows.queries[query], rows.documents[key]) for query, judged in rows.qrels.items() for key in judged]


def _natural_questions() -> list[tuple[str, str]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingDependency("text from the hub", str(error.name), "bench") from None
    try:
        rows = datasets.load_dataset(_QUESTIONS_ID, "pair", split="train")
    except (OSError, ValueError) as error:
        raise DownloadError(f"{_QUESTIONS_ID}: not fetched ({error}). Or bring text: --data DIR") from None
    return list(zip(rows["query"], rows["answer"], strict=True))


def _generated(count: int) -> list[tuple[str, str]]:
    """Each question with its passage and those after it; every length of `_WORDS` is as frequent as it should be."""
    passages = read_passages()
    words = [row["text"].split() for row in passages]
    places = (np.arange(count) + 0.5) / count
    lengths = np.interp(np.random.default_rng(0).permutation(places), np.linspace(0, 1, len(_WORDS)), _WORDS)
    pairs = []
    for index, length in enumerate(lengths.round().astype(int)):
        document = chain.from_iterable(islice(cycle(words), index, None))
        pairs.append((passages[index % len(passages)]["question"], " ".join(islice(document, length))))
    return pairs


def _joined(documents: list[str], start: int, characters: int) -> str:
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        parts.append(documents[(start + len(parts)) % len(documents)])
    return " ".join(parts)
