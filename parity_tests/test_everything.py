"""`ettin-bench all`: what it makes and what it says; and what every contestant's memory is measured by."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import UsageError
from ettin.artifacts.manifest import Manifest
from ettin.bench import everything
from ettin.bench.cli import command
from ettin.bench.contest import Contest, contestants
from ettin.bench.cpu import CpuRun
from ettin.export.options import Silent
from ettin.export.source.sizes import SIZES

RESULTS = Path(__file__).parents[1] / "bench" / "results"
Artifacts = dict[tuple[str, str], Path]


def test_artifacts_of_an_earlier_run_are_kept(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    root = tmp_path / "ettin-reranker-demo"
    for (target, precision), folder in demo_artifacts.items():
        if (target, precision) != ("onnx", "fp32"):
            shutil.copytree(folder, root / f"{target}-{precision}")
    checkpoint = everything.checkpoint_of("demo", tmp_path, None)
    found, missing = everything.export_all(checkpoint, tmp_path, 512, Silent())
    assert [path.name for path in found] == sorted(f"{target}-{precision}" for target, precision in demo_artifacts)
    assert Manifest.read(root / "onnx-fp32").max_length_tokens == 512
    assert Manifest.read(root / "onnx-int8").max_length_tokens == 7999
    assert missing.keys() == {"trt-bf16", "trt-rtx-bf16"}


def test_random_weights_are_written_once(tmp_path: Path) -> None:
    first = everything.checkpoint_of("17m", tmp_path, None)
    assert first.is_random and first.shape == SIZES["17m"].shape.__class__(
        **{**vars(SIZES["17m"].shape), "vocab_size": first.shape.vocab_size, "pad_token_id": first.shape.pad_token_id}
    )
    weights = tmp_path / "17m-random" / "checkpoint" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert everything.checkpoint_of("17m", tmp_path, None).is_random and weights.stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="'70m' is neither a folder nor one of: demo, 17m, 32m"):
        everything.checkpoint_of("70m", tmp_path, None)


def test_larger_models_get_fewer_pairs() -> None:
    counts = [everything.pairs_for(size.shape.num_parameters) for size in SIZES.values()]
    assert counts == sorted(counts, reverse=True) and min(counts) >= 8


def test_command(demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for (target, precision), folder in demo_artifacts.items():
        shutil.copytree(folder, tmp_path / "made" / "ettin-reranker-demo" / f"{target}-{precision}")
    result = json.loads((RESULTS / "2026-11-21-cpu-17m-lexical-squad.json").read_text())["result"]
    asked: list[CpuRun] = []

    def measured(self: CpuRun) -> dict[str, Any]:
        asked.append(self)
        return dict(result)

    monkeypatch.setattr(CpuRun, "measured", measured)
    options = ["--output", str(tmp_path / "results"), "--artifacts", str(tmp_path / "made")]
    done = CliRunner().invoke(command, ["all", "demo", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "results").iterdir()
    assert file.name.endswith("-cpu-ettin-reranker-demo-generated.json") and str(file) in done.stdout
    assert json.loads(file.read_text())["result"]["missing"].keys() == {"trt-bf16", "trt-rtx-bf16"}
    assert len(asked[0].artifacts) == len(demo_artifacts) and asked[0].peers == ("st-fp32", "st-fp32-tuned", "st-bf16")


def test_memory_is_the_contestants_own(demo_artifacts: Artifacts) -> None:
    """A child begins with its parent's peak in what `getrusage` says."""
    ballast = np.ones(900 << 17)  # 900 MiB
    entries = contestants([demo_artifacts["openvino", "int8"]], {}, None, ())
    Contest([("a", "b")] * 4, 2, 64, rounds=1).run(entries)
    assert ballast[-1] == 1 and 50 < entries[0].facts["peak_rss_mib"] < 700
