"""The pairs that a speed is measured on."""

import random
from pathlib import Path

from ettin.bench.beir import read_beir
from ettin.export.proof_pairs import natural_pairs

_CHARACTERS_PER_TOKEN = 12  # more than any text has, so that truncation decides the length


def pairs_to_score(data: Path | None, count: int, fill_tokens: int | None = None) -> list[tuple[str, str]]:
    """Judged pairs of a set in a fixed random order, or the project's own passages, as often as it takes.

    Args:
        data: a retrieval set in BEIR form; None: the project's own passages.
        count: pairs wanted.
        fill_tokens: join documents until each pair has at least this many tokens; None: natural lengths.
    """
    if data is None:
        found = [(pair.query, pair.document) for pair in natural_pairs()]
    else:
        rows = read_beir(data)
        found = [(rows.queries[query], rows.documents[each]) for query, judged in rows.qrels.items() for each in judged]
        random.Random(0).shuffle(found)  # noqa: S311
    chosen = (found * (-(-count // len(found))))[:count]
    if fill_tokens is None:
        return chosen
    documents = [document for _, document in found]
    return [
        (query, _joined(documents, at, fill_tokens * _CHARACTERS_PER_TOKEN)) for at, (query, _) in enumerate(chosen)
    ]


def _joined(documents: list[str], start: int, characters: int) -> str:
    parts: list[str] = []
    size = 0
    while size < characters:
        parts.append(documents[(start + len(parts)) % len(documents)])
        size += len(parts[-1]) + 1
    return " ".join(parts)
