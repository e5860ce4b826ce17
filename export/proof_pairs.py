"""The pairs that every export is verified on."""

import json
from dataclasses import dataclass
from pathlib import Path

from ettin.artifacts.errors import InputError

_PASSAGES = Path(__file__).parent / "passages.jsonl"
_OTHERS = (0, 1, 7, 13, 22)  # a question meets its own passage and four others
_CANDIDATES = tuple(range(20))  # … and for ranking quality nineteen

# Around every edge: the window (64), the block span (192), the block thresholds (256, 512), blocks of 64; and one long
# input.
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
    texts = [row["text"] for row in rows]
    return [
        ProofPair(row["question"], texts[(at + step) % len(rows)])
        for at, row in enumerate(rows)
        for step in (_CANDIDATES if ranking else _OTHERS)
    ]


def proof_pairs(extra: Path | None = None, ranking: bool = False) -> list[ProofPair]:
    """The project's own texts: pairs at their natural lengths, edge cases, and a grid of exact lengths.

    Args:
        extra: JSON lines with "query" and "document", added to them.
        ranking: twenty candidates a question instead of five.

    Raises:
        InputError: a line of `extra` is something else.
    """
    rows = read_passages()
    count = len(rows)
    edges = [
        ProofPair("", "an empty query"),
        ProofPair("an empty document", ""),
        ProofPair("", ""),
        ProofPair("a [SEP] in a query 🙂", "and a [MASK] in a document\u00a0\u200d\ttoo"),
    ]
    # Exact lengths: texts long enough for any tokenizer, truncated.
    texts = [row["text"] for row in rows]
    grid = [
        ProofPair(rows[at % count]["question"], " ".join(texts[at % count :] + texts[: at % count]), tokens)
        for at, tokens in enumerate(GRID_TOKENS)
    ]
    return natural_pairs(ranking) + edges + grid + (read_pairs(extra) if extra else [])


def read_pairs(path: Path) -> list[ProofPair]:
    """The user's pairs: JSON lines with "query" and "document".

    Raises:
        InputError: a line is something else.
    """
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
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
