"""Every target against FlashAttention-2's own scores, recorded on a GPU by `bench/gpu.py --golden`, on any machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import VARIANTS, shared_path

from ettin.artifacts.manifest import Manifest
from ettin.artifacts.metrics import score_error
from ettin.artifacts.tolerances import FP32, INT8_SPEARMAN, REDUCED_RATIO
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.reference import natural_pairs
from ettin.export.source.checkpoint import read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import Batch, load

ROOT = Path(__file__).parents[1]
GOLDENS = sorted((Path(__file__).parent / "goldens").glob("fa2-*.json"))


def compare(artifact: Path, golden: Path) -> None:
    """Fails unless an artifact of the same weights is as near to FlashAttention-2 as its precision allows."""
    recorded = json.loads(golden.read_text())
    manifest = Manifest.read(artifact)
    assert recorded["result"]["weights_sha256"] == manifest.source.weights_sha256
    cases = recorded["result"]["cases"]
    fa2, fp32 = (np.array([case[key] for case in cases]) for key in ("fa2", "fp32"))
    sequences = [np.array(case["ids"], np.int32) for case in cases]
    with load(artifact) as runtime:
        starts = range(0, len(sequences), 16)
        batches = [Batch.of(sequences[start : start + 16], manifest.tokenizer.pad_token_id) for start in starts]
        scores = np.concatenate([runtime.score(batch) for batch in batches])
    error, own = score_error(scores, fa2), score_error(fp32, fa2)
    if manifest.precision == "int8":
        assert error.spearman is not None and error.spearman >= INT8_SPEARMAN
        return
    # What FlashAttention-2 in bf16 errs by, and what this precision may err by.
    ratio = REDUCED_RATIO.get(manifest.precision, 0.0)
    assert error.mean_abs <= (1 + ratio) * own.mean_abs + FP32, (error, own)


@pytest.fixture(scope="module")
def artifacts(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[tuple[str, str], Path]]:
    """Of every checkpoint that has a golden."""
    made = {"ettin-reranker-demo": demo_artifacts}
    for golden in GOLDENS:
        name = golden.stem.removeprefix("fa2-")
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            export = Export(read_checkpoint(shared_path(f"checkpoints/{name}")), Options())
            made[name] = {each: root / "-".join(each) for each in VARIANTS}
            for (target, precision), folder in made[name].items():
                export.run(Job(target, precision, folder))
    return made


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_recorded_on_a_gpu(golden: Path, variant: tuple[str, str], artifacts: Any) -> None:
    compare(artifacts[golden.stem.removeprefix("fa2-")][variant], golden)


# The comparison itself, with scores that the kernel's stand-in makes of the same code on a CPU.


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    golden = tmp_path_factory.mktemp("golden") / "fa2-ettin-reranker-demo.json"
    pairs = golden.with_name("pairs.jsonl")
    lines = [json.dumps({"query": each.query, "document": each.document}) for each in natural_pairs()[::4]]
    pairs.write_text("\n".join(lines))
    options = ["--device", "cpu", "--sizes", "tiny", "--minutes", "0.02", "--golden", golden, "--pairs", pairs]
    command = [sys.executable, ROOT / "bench" / "gpu.py", *options, "--checkpoint", DEMO_FOLDER]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return golden


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_like_the_stand_in(
    stand_in: Path, variant: tuple[str, str], demo_artifacts: dict[tuple[str, str], Path]
) -> None:
    compare(demo_artifacts[variant], stand_in)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_other_scores_are_seen(
    stand_in: Path, variant: tuple[str, str], demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    content = json.loads(stand_in.read_text())
    for at, case in enumerate(content["result"]["cases"]):
        if at % 10 == 0:
            case["ids"] = case["ids"][::-1]
    changed = tmp_path / stand_in.name
    changed.write_text(json.dumps(content))
    with pytest.raises(AssertionError):
        compare(demo_artifacts[variant], changed)
