"""The pairs that a speed is measured on."""

import random
from pathlib import Path

import numpy as np

from ettin.bench.beir import read_beir
from ettin.export.reference import read_passages

NATURAL_QUESTIONS = Path("nq")  # instead of a folder: the release's text, from the hub
_GENERATED = "generated"

_CHARACTERS_PER_TOKEN = 12  # more than any text has, so that truncation decides the length

# Words of a document: deciles of SQuAD v1.1's paragraphs (dev, by question; the last one is the 99th percentile), which
# are about as long as Natural Questions' answers. With a question, 43 to 450 tokens, 180 on average.
_WORDS = (24, 77, 89, 97, 105, 114, 127, 140, 157, 189, 340)


def text_name(data: Path | None) -> str:
    """What the text is called in a result."""
    return data.name if data else _GENERATED


def pairs_to_score(data: Path | None, count: int, fill_tokens: int | None = None) -> list[tuple[str, str]]:
    """Pairs in a fixed random order, as often as it takes.

    Args:
        data: a retrieval set in BEIR form, whose judged pairs are taken; `NATURAL_QUESTIONS`; None: the project's own
            passages, joined and cut to lengths like those of Natural Questions.
        count: pairs wanted.
        fill_tokens: join documents until each pair has at least this many tokens; None: natural lengths.

    Raises:
        InputError: not a retrieval set.
        DownloadError: Natural Questions can't be had.
    """
    found = _found(data, count)
    chosen = (found * (-(-count // len(found))))[:count]
    if fill_tokens is None:
        return chosen
    documents = [document for _, document in found]
    return [
        (query, _joined(documents, at, fill_tokens * _CHARACTERS_PER_TOKEN)) for at, (query, _) in enumerate(chosen)
    ]


def _found(data: Path | None, count: int) -> list[tuple[str, str]]:
    shuffle = random.Random(0).shuffle  # noqa: S311
    if data is None:
        return _generated(count)
    if data == NATURAL_QUESTIONS and not data.is_dir():
        from ettin.bench.hub_sets import natural_questions

        found = natural_questions()
    else:
        rows = read_beir(data)
        found = [(rows.queries[query], rows.documents[each]) for query, judged in rows.qrels.items() for each in judged]
    shuffle(found)
    return found


def _generated(count: int) -> list[tuple[str, str]]:
    """Each question with the passage that answers it and those after it, as many words as its place in `_WORDS`."""
    passages = read_passages()
    words = [row["text"].split() for row in passages]
    places = (np.arange(count) + 0.5) / count  # every length as often as it should be
    lengths = np.interp(np.random.default_rng(0).permutation(places), np.linspace(0, 1, len(_WORDS)), _WORDS)
    pairs = []
    for at, length in enumerate(lengths.round().astype(int)):
        found: list[str] = []
        step = at
        while len(found) < length:
            found += words[step % len(words)]
            step += 1
        pairs.append((passages[at % len(passages)]["question"], " ".join(found[:length])))
    return pairs


def _joined(documents: list[str], start: int, characters: int) -> str:
    parts: list[str] = []
    size = 0
    while size < characters:
        parts.append(documents[(start + len(parts)) % len(documents)])
        size += len(parts[-1]) + 1
    return " ".join(parts)
