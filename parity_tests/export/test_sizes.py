"""The released shapes, with random weights: every target exports and is proven. From 32m on: `pytest -m slow`."""

from pathlib import Path

import pytest

from ettin.artifacts.manifest import Manifest
from ettin.export import pipeline
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.proof_pairs import ProofPair, natural_pairs
from ettin.export.source.resolve import opened

TARGETS = ["onnx", "openvino", "transformers"]
SIZES = ["17m", *(pytest.param(size, marks=pytest.mark.slow) for size in ("32m", "68m", "150m", "400m", "1b"))]


def few_pairs(extra: Path | None, ranking: bool) -> list[ProofPair]:
    """The least that an artifact may carry, short, and one pair over the block threshold."""
    pairs = natural_pairs()
    short = [ProofPair(pair.query, pair.document, 24) for pair in pairs[:64]]
    text = " ".join(pair.document for pair in pairs[:40])
    return [*short, ProofPair("a long one", text, 131), ProofPair("a long one", text, 530)]


@pytest.mark.parametrize("size", SIZES)
def test_released_shape(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "proof_pairs", few_pairs)
    jobs = [Job(target, "fp32", tmp_path / target) for target in TARGETS]
    with opened(size=size, random_weights=True) as checkpoint:
        export = Export(checkpoint, Options())
        export.prepare(jobs)
        for job in jobs:
            found = export.run(job)
            assert found is not None and found.ok and found.parity.pairs == 66
            manifest = Manifest.read(job.output)
            assert manifest.source.weights == "random"
            # 1b is over the 2 GiB that protobuf holds; weights over 1 GiB go to a file of their own.
            external = (job.output / "onnx" / "model.onnx_data").exists()
            assert external == (job.target == "onnx" and size in ("400m", "1b"))
