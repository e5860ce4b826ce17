"""Retrieval sets in BEIR form: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/test.tsv (or qrels.tsv beside them)."""

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin.artifacts.errors import InputError


@dataclass(frozen=True)
class RetrievalSet:
    """A corpus with judged queries.

    Args:
        name: the folder's name and the split.
        documents: text by id; a title stands before its text.
        queries: text by id; judged ones only.
        qrels: by query id, relevance by document id.
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, float]]


def read_beir(folder: Path, split: str = "test") -> RetrievalSet:
    """Reads a set.

    Args:
        folder: holds the three files. Where there is no folder `qrels`, "test" is read from queries and qrels.tsv,
            "train" from queries-train and qrels-train.tsv.
        split: "test" or "train".

    Raises:
        InputError: a file is missing or not in this form.
    """
    standard = folder / "qrels" / f"{split}.tsv"
    ending = "" if split == "test" or standard.exists() else f"-{split}"
    judgements = standard if standard.exists() else folder / f"qrels{ending}.tsv"
    try:
        documents = {
            row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _rows(folder, "corpus.jsonl")
        }
        queries = {row["_id"]: row["text"] for row in _rows(folder, f"queries{ending}.jsonl")}
        qrels: dict[str, dict[str, float]] = {}
        with judgements.open(encoding="utf-8", newline="") as lines:
            table = csv.reader(lines, delimiter="\t")
            next(table)
            for query, document, score in table:
                qrels.setdefault(query, {})[document] = float(score)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder}: not a retrieval set in BEIR form, split '{split}' ({error})") from None
    judged = {key: text for key, text in queries.items() if key in qrels}
    return RetrievalSet(f"{folder.resolve().name}/{split}", documents, judged, qrels)


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    plain = folder / name
    with plain.open("rb") if plain.exists() else gzip.open(folder / f"{name}.gz") as lines:
        for line in lines:
            yield json.loads(line)
