"""`parity.jsonl`: pairs, token ids and reference scores that travel in an artifact."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from ettin.artifacts.errors import DamagedArtifact
from ettin.artifacts.opened import OpenArtifact

PARITY_NAME = "parity.jsonl"


class ParityCase(BaseModel):
    """One pair with the token ids and the score of the reference.

    Args:
        query: first text.
        document: second text.
        max_length: tokens that the pair is truncated to.
        ids: the reference's token ids.
        gold: the reference's score, in fp32.
        torch_bf16: the score of PyTorch in bf16, where the artifact's tolerance needs it.
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


def read_parity(folder: Path, trusted_key: Path | None = None) -> list[ParityCase]:
    """Reads the cases of an artifact; `trusted_key`: see `OpenArtifact`.

    Raises:
        ManifestError: not an artifact.
        DamagedArtifact: the file is missing, differs from the manifest, or a line is not a case.
    """
    with OpenArtifact(folder, trusted_key=trusted_key) as artifact:
        content = artifact.read(PARITY_NAME)
    try:
        # Lines end at line feeds alone: texts may hold other line separators.
        return [ParityCase.model_validate_json(line) for line in content.split(b"\n") if line]
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedArtifact(
            f"{folder / PARITY_NAME}: not a list of parity cases ({first['msg'][:200]}). Export again."
        ) from None
