"""What an export writes about an artifact: its manifest, and with it its card."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ettin.artifacts.errors import shown
from ettin.artifacts.files import file_sha256, list_files
from ettin.artifacts.manifest import CARD_NAME, MANIFEST_NAME, Calibration, Graph, Manifest, Parity, Source, Tokenizer
from ettin.artifacts.precisions import joined
from ettin.artifacts.targets import target_named
from ettin.export.card import card
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.writer import Lowered
from ettin.runtimes.machine import installed_versions

REFERENCE = "gold: sentence-transformers CrossEncoder, fp32, SDPA, CPU"
_PACKAGES = (
    "ettin-export", "torch", "transformers", "sentence-transformers", "onnx", "onnxruntime", "openvino",
    "openvino-tokenizers", "tensorrt", "tensorrt-rtx", "tokenizers",
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """What the manifest says that is in neither the checkpoint nor the lowered model."""

    target: str
    precision: str
    max_length: int  # tokens that pairs are truncated to
    command: str  # what the user typed
    weights_sha256: str  # of the checkpoint


def write_manifest(
    stage: Path, checkpoint: Checkpoint, about: About, lowered: Lowered, parity: Parity, calibration: Calibration | None
) -> None:
    """Writes `manifest.json` and, for people, `README.md` into `stage`."""
    target = target_named(about.target)
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
        graph=Graph.model_validate(lowered.graph),
        interface=lowered.interface,
        tokenizer=Tokenizer(sha256=file_sha256(stage / "tokenizer.json"), pad_token_id=checkpoint.shape.pad_token_id),
        max_length_tokens=about.max_length,
        activation=checkpoint.activation,
        needs=lowered.needs,
        entry=lowered.entry,
        calibration=calibration,
        engine=lowered.engine,
        experimental=bool(target.component(target.device_for(lowered.needs.device)).experimental),
        toolchain={
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            **installed_versions(_PACKAGES),
        },
        command=shown(about.command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parity=parity,
        files=list_files(stage),
    )
    (stage / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    (stage / CARD_NAME).write_text(card(manifest, checkpoint.folder), encoding="utf-8")


def join(stage: Path, parts: Sequence[Path], checkpoint: Checkpoint) -> None:
    """Moves the files of artifacts that differ in precision into `stage`, under one manifest and one card."""
    manifests = tuple(map(Manifest.read, parts))
    for part, manifest in zip(parts, manifests, strict=True):
        for entry in manifest.files:
            target = stage / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (part / entry.path).replace(target)
    whole = joined(manifests)
    (stage / MANIFEST_NAME).write_bytes(whole.to_bytes())
    (stage / CARD_NAME).write_text(card(whole, checkpoint.folder), encoding="utf-8")


def unverified() -> Parity:
    """The record of an artifact that was not run."""
    return Parity(
        status="unverified", pairs=0, max_abs_error=None, mean_abs_error=None, spearman=None, batch_max_abs_error=None,
        arithmetic=(), reference=REFERENCE, rule="not run",
    )  # fmt: skip
