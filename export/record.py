"""What an export writes about an artifact: its manifest and its card."""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ettin.artifacts.checksum import file_sha256
from ettin.artifacts.errors import shown
from ettin.artifacts.files import list_files
from ettin.artifacts.manifest import MANIFEST_NAME, Calibration, Manifest, Parity, Source, Tokenizer
from ettin.artifacts.versions import installed_versions
from ettin.export.card import card
from ettin.export.checkpoint import Checkpoint
from ettin.export.lowering import Lowered

REFERENCE = "gold: sentence-transformers CrossEncoder, fp32, SDPA, CPU"


@dataclass(frozen=True)
class About:
    """What the manifest says that neither checkpoint nor lowering know.

    Args:
        target: see `TARGETS`.
        precision: see `TARGETS`.
        max_length: tokens that the artifact truncates to.
        command: what the user typed.
        weights_sha256: of the checkpoint.
    """

    target: str
    precision: str
    max_length: int
    command: str
    weights_sha256: str


def write_manifest(
    stage: Path, checkpoint: Checkpoint, about: About, lowered: Lowered, parity: Parity, calibration: Calibration | None
) -> None:
    """Writes `README.md` and, over all files, `manifest.json` into `stage`."""
    tokenizer = stage / "tokenizer.json"
    manifest = Manifest(
        name=checkpoint.name,
        target=about.target,
        precision=about.precision,
        source=Source(
            id=checkpoint.id,
            revision=checkpoint.revision,
            weights="random" if checkpoint.is_random else "checkpoint",
            weights_sha256=about.weights_sha256,
            shape=checkpoint.shape.to_json(),
        ),
        graph=lowered.graph,
        interface=lowered.interface,
        tokenizer=Tokenizer(sha256=file_sha256(tokenizer), pad_token_id=checkpoint.shape.pad_token_id),
        max_length_tokens=about.max_length,
        activation=checkpoint.activation,
        needs=lowered.needs,
        entry=lowered.entry,
        calibration=calibration,
        engine=lowered.engine,
        toolchain=toolchain(),
        command=shown(about.command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parity=parity,
        files=(),
    )
    (stage / "README.md").write_text(card(manifest), encoding="utf-8")
    whole = manifest.model_copy(update={"files": list_files(stage)})
    (stage / MANIFEST_NAME).write_bytes(whole.to_bytes())


def toolchain() -> dict[str, str]:
    """Versions of what took part, and the machine's kind."""
    packages = (
        "ettin-export",
        "torch",
        "transformers",
        "sentence-transformers",
        "onnx",
        "onnxruntime",
        "openvino",
        "tensorrt",
        "tensorrt-rtx",
        "tokenizers",
    )
    machine = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    return machine | installed_versions(packages)


def unverified() -> Parity:
    """The record of an artifact that was not run."""
    return Parity(
        status="unverified", pairs=0, max_abs_error=None, mean_abs_error=None, spearman=None, batch_max_abs_error=None,
        arithmetic=(), reference=REFERENCE, rule="not run",
    )  # fmt: skip
