"""What an export writes about an artifact: its manifest and its card."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ettin.artifacts.errors import shown
from ettin.artifacts.files import file_entry, file_sha256, list_files
from ettin.artifacts.manifest import MANIFEST_NAME, Calibration, Graph, Manifest, Parity, Source, TensorSpec, Tokenizer
from ettin.artifacts.precisions import in_precision, joined, precisions
from ettin.artifacts.targets import target_named
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
    """Writes `README.md` and, over all files, `manifest.json` into `stage`."""
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
        toolchain={
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            **installed_versions(_PACKAGES),
        },
        command=shown(about.command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parity=parity,
        files=(),
    )
    (stage / "README.md").write_text(card(manifest), encoding="utf-8")
    whole = manifest.model_copy(update={"files": list_files(stage)})
    (stage / MANIFEST_NAME).write_bytes(whole.to_bytes())


def join(stage: Path, parts: Sequence[Path]) -> None:
    """Moves the files of artifacts that differ in precision into `stage`, under one manifest and one card."""
    manifests = tuple(map(Manifest.read, parts))
    for part, manifest in zip(parts, manifests, strict=True):
        for entry in manifest.files:
            target = stage / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (part / entry.path).replace(target)
    whole = joined(manifests)
    (stage / "README.md").write_text(card(whole), encoding="utf-8")
    with (stage / "README.md").open("rb") as file:
        files = (file_entry("README.md", file), *whole.files)
    (stage / MANIFEST_NAME).write_bytes(whole.model_copy(update={"files": files}).to_bytes())


def unverified() -> Parity:
    """The record of an artifact that was not run."""
    return Parity(
        status="unverified", pairs=0, max_abs_error=None, mean_abs_error=None, spearman=None, batch_max_abs_error=None,
        arithmetic=(), reference=REFERENCE, rule="not run",
    )  # fmt: skip


def card(manifest: Manifest) -> str:
    """The `README.md` of an artifact: how to use it, and what was proven about it."""
    source = manifest.source
    revision = f" at revision `{source.revision}`" if source.revision else ""
    scores = "raw logits" if manifest.activation == "identity" else "sigmoid(logit)"
    random = f"""> [!WARNING]
> **Random weights.** This artifact has the shape of {source.id} and none of its weights: the scores mean nothing. It is
> for trying hardware.

"""
    variants = [in_precision(manifest, precision) for precision in precisions(manifest)]
    proofs = "\n\n".join(
        f"### {variant.precision}: `{variant.entry}`\n\n{_proof(variant.parity)}" for variant in variants
    )
    return f"""# {manifest.name}: {manifest.target}, {", ".join(precisions(manifest))}

{random if source.weights == "random" else ""}\
Reranker `{source.id}`{revision}, exported by ettin-export {manifest.toolchain["ettin-export"]}:

    {manifest.command}

```python
# pip install "{target_named(manifest.target).runtime.requirement}"
from ettin.runtimes import load

with load(".") as reranker:{f'  # or precision="{manifest.variants[0].precision}"' if manifest.variants else ""}
    scores = reranker.predict([("query", "document")])
    hits = reranker.rank("query", ["document", "another"], top_k=1)
```

Scores are {scores}; pairs are truncated to {manifest.max_length_tokens} tokens (`longest_first`).
`{manifest.entry}` takes {_tensors(manifest.interface.inputs)} and gives {_tensors(manifest.interface.outputs)}.

## Proof

{proofs if manifest.variants else _proof(manifest.parity)}
"""


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"`{spec.name}` {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in specs)


def _proof(parity: Parity) -> str:
    if parity.status != "verified":
        return "**Not verified.** It loads after `ettin-verify .` has passed once on the machine that runs it."
    spearman = "–" if parity.spearman is None else f"{parity.spearman:.6f}"
    return f"""Compared with {parity.reference} on {parity.pairs} pairs ({parity.rule}):

| max \\|Δ\\| | mean \\|Δ\\| | Spearman | mixed batch against single |
| --- | --- | --- | --- |
| {parity.max_abs_error:.2e} | {parity.mean_abs_error:.2e} | {spearman} | {parity.batch_max_abs_error:.1e} |

To verify it again, on any machine, without torch: `ettin-verify .`"""
