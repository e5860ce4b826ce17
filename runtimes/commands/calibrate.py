"""`ettin-calibrate`: fits probabilities of relevance to labelled pairs, and stores the fit in the artifact."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from ettin.artifacts.errors import ArtifactError, InputError, UsageError
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.precisions import precisions
from ettin.artifacts.signatures import read_private_key
from ettin.runtimes.calibration import fitted
from ettin.runtimes.commands import console
from ettin.runtimes.loading import load


@click.command(
    epilog=console.example_epilog("ettin-calibrate ettin-reranker-demo/openvino-int8 labelled.jsonl"),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("pairs", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@console.DEVICE
@console.THREADS
@console.KEY
@click.option("--sign", type=click.Path(path_type=Path), help="Private key (PEM) to sign the artifact again with.")
def command(artifact: Path, pairs: Path, trusted_key: Path | None, sign: Path | None, **settings: Any) -> None:
    """Fit probabilities of relevance to labelled PAIRS, and store the fit in ARTIFACT's manifest.

    PAIRS are JSON lines: {"query": "…", "document": "…", "label": 0 or 1}. Logits stay as they are; activation
    "calibrated" then gives sigmoid(slope · logit + offset). A signed artifact needs --sign: its manifest changes.
    """
    with pairs.open("rb") as lines:
        rows = [_row(line, f"{pairs}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if sign is not None:
        read_private_key(sign)
    with OpenArtifact(artifact, trusted_key=trusted_key) as opened:
        if opened.signature is not None and sign is None:
            raise UsageError(f"{artifact} is signed, and its manifest changes. Sign it again: --sign KEY")
    with load(artifact, trusted_key=trusted_key, **settings) as runtime:
        with console.step(f"score {len(rows)} pairs"):
            logits = runtime.predict([(query, document) for query, document, _ in rows], activation_fn="identity")
        digest = runtime.manifest.digest
    fit = fitted(logits, np.array([label for _, _, label in rows], np.bool_))
    with OpenArtifact(artifact, trusted_key=trusted_key) as opened:
        if opened.manifest.digest != digest:
            raise ArtifactError(f"{artifact}: was replaced meanwhile. Run again: ettin-calibrate {artifact} PAIRS")
        held = precisions(opened.whole_manifest)
        opened.replace_manifest(opened.whole_manifest.model_copy(update={"score_calibration": fit}))
    console.sign(artifact, sign)
    click.echo(f"probability of relevance = sigmoid({fit.slope:.4g} · logit + {fit.offset:.4g}); in manifest.json")
    if len(held) > 1:
        click.echo(f"fitted to the logits of {held[0]}, used for {', '.join(held)}")
    figures = [("sigmoid(logit)", fit.before), ("calibrated (cross-validated)", fit.after)]
    cells = [[name, f"{each.brier:.4f}", f"{each.expected_calibration_error:.4f}"] for name, each in figures]
    console.table(cells, [f"{fit.pairs} pairs, {fit.relevant} relevant", "Brier", "expected calibration error"])


def _row(line: bytes, where: str) -> tuple[str, str, bool]:
    try:
        row = json.loads(line)
        query, document, label = row["query"], row["document"], row["label"]
    except (ValueError, TypeError, LookupError, RecursionError):
        query = document = label = None
    if not isinstance(query, str) or not isinstance(document, str) or label not in (0, 1):
        raise InputError(f'{where}: expected {{"query": "…", "document": "…", "label": 0 or 1}}')
    return query, document, bool(label)


main = partial(console.run, command)
