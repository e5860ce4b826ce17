"""The pairs that every export is verified on, and the reader of the user's own pairs. Needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from ettin.artifacts.errors import InputError

_PASSAGES = Path(__file__).parent / "passages.jsonl"
_OTHERS = (0, 1, 7, 13, 22)  # a question is paired with its own passage and four others
_CANDIDATES = tuple(range(20))  # … and for ranking quality with nineteen others

# Lengths around every edge (the window of 64, the block span of 192, the block thresholds of 256 and 512, blocks of
# 64), and one long input.
GRID_TOKENS = (
    8, 63, 64, 65, 66, 127, 128, 129, 130, 191, 192, 193, 255, 256, 257, 320, 321, 511, 512, 513, 577, 700, 2048,
)  # fmt: skip


@dataclass(frozen=True)
class ProofPair:
    """A pair and the tokens that it is truncated to (None: the model's maximum)."""

    query: str
    document: str
    max_length: int | None = None


def read_passages(path: Path = _PASSAGES) -> list[dict[str, str]]:
    """Objects with "question" and the "text" that answers it."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def natural_pairs(ranking: bool = False) -> list[ProofPair]:
    """Pairs of the project's own texts at their natural lengths: 220, or for ranking quality 880."""
    rows = read_passages()
    return [
        ProofPair(row["question"], rows[(index + step) % len(rows)]["text"])
        for index, row in enumerate(rows)
        for step in (_CANDIDATES if ranking else _OTHERS)
    ]


def proof_pairs(extra: Path | None = None, ranking: bool = False) -> list[ProofPair]:
    """The pairs that an export is verified on.

    They are `natural_pairs`, edge cases, a grid of exact lengths, and those in the file `extra` (see `read_pairs`).
    """
    edges = [
        ProofPair("", "an empty query"),
        ProofPair("an empty document", ""),
        ProofPair("", ""),
        ProofPair("a [SEP] in a query 🙂", "and a [MASK] in a document\u00a0\u200d\ttoo"),
    ]
    # Exact lengths come from truncation: all passages together are long enough for any tokenizer.
    rows = read_passages()
    texts = [row["text"] for row in rows]
    grid = [
        ProofPair(rows[index]["question"], " ".join(texts[index:] + texts[:index]), tokens)
        for index, tokens in enumerate(GRID_TOKENS)
    ]
    return natural_pairs(ranking) + edges + grid + (read_pairs(extra) if extra else [])


def read_pairs(path: Path) -> list[ProofPair]:
    """The user's pairs: JSON lines with "query" and "document".

    Raises:
        InputError: a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            query, document = row["query"], row["document"]
        except (ValueError, TypeError, KeyError):
            query = document = None
        if not isinstance(query, str) or not isinstance(document, str):
            raise InputError(f"{path}, line {number}: expected a JSON object with strings 'query' and 'document'")
        pairs.append(ProofPair(query, document))
    return pairs
