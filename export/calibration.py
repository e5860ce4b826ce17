"""The texts that int8 is calibrated on: never those that it is judged on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ettin.artifacts.errors import InputError
from ettin.export.proof_pairs import read_pairs, read_passages
from ettin.runtimes.batch import Ids
from ettin.runtimes.tokenizer import PairTokenizer

_OWN = Path(__file__).parent / "calibration.jsonl"
_OFFSETS = (0, 3, 8, 15)  # a question meets its own passage and three others
_MIN_PAIRS = 32


@dataclass(frozen=True)
class CalibrationText:
    """Real query–document pairs, from short to long, none padded.

    Args:
        pairs: the pairs.
        name: where they come from.
        sha256: of the file.
    """

    pairs: list[tuple[str, str]]
    name: str
    sha256: str

    def sequences(self, tokenizer: PairTokenizer, max_length: int) -> list[Ids]:
        """Token ids of the pairs, int32 [its tokens] each."""
        return tokenizer.pairs(self.pairs, max_length)


def calibration_text(file: Path | None = None) -> CalibrationText:
    """The project's own calibration text, or the user's.

    The project's 24 passages are not those of the proof pairs. They are paired with questions one by one (96 pairs)
    and, for long inputs, joined in fours and eights (9 pairs).

    Args:
        file: JSON lines with "query" and "document".

    Raises:
        InputError: the file is not in this form, or too short to calibrate on.
    """
    if file is not None:
        pairs = [(pair.query, pair.document) for pair in read_pairs(file)]
        if len(pairs) < _MIN_PAIRS:
            raise InputError(f"{file}: {len(pairs)} pairs, expected at least {_MIN_PAIRS} to calibrate on")
        return CalibrationText(pairs, file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    rows = read_passages(_OWN)
    texts = [row["text"] for row in rows]
    pairs = [(row["question"], texts[(at + step) % len(rows)]) for at, row in enumerate(rows) for step in _OFFSETS]
    for size in (4, 8):
        pairs += [(rows[at]["question"], " ".join(texts[at : at + size])) for at in range(0, len(rows), size)]
    return CalibrationText(pairs, "ettin-export/calibration.jsonl", hashlib.sha256(_OWN.read_bytes()).hexdigest())
