"""`parity.jsonl`: pairs, token ids and reference scores that travel in an artifact."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from ettin.artifacts.errors import DamagedArtifact

PARITY_NAME = "parity.jsonl"


class ParityCase(BaseModel):
    """One pair and what the reference made of it.

    Args:
        query: first text.
        document: second text.
        max_length: tokens that the pair is truncated to.
        ids: the reference's token ids.
        gold: its score, fp32 SDPA.
        torch_bf16: the score of PyTorch in bf16, where the artifact's rule needs it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: str
    document: str
    max_length: PositiveInt
    ids: list[int]
    gold: float
    torch_bf16: float | None = None


def write_parity(folder: Path, cases: list[ParityCase]) -> None:
    """Writes the cases, one a line."""
    lines = (case.model_dump_json(exclude_none=True) + "\n" for case in cases)
    (folder / PARITY_NAME).write_text("".join(lines), encoding="utf-8")


def read_parity(folder: Path) -> list[ParityCase]:
    """Reads them back.

    Raises:
        DamagedArtifact: the file is missing or a line is not a case.
    """
    path = folder / PARITY_NAME
    try:
        with path.open(encoding="utf-8") as lines:
            return [ParityCase.model_validate(json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise DamagedArtifact(f"{path}: missing, so the artifact can't be verified. Export again.") from None
    except (ValueError, ValidationError) as error:
        raise DamagedArtifact(f"{path}: not a list of parity cases ({error}). Export again.") from None
