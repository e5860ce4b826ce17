"""`bench/gpu.py` from end to end, on a CPU with a small shape and a stand-in for the kernel."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ettin.artifacts.errors import OutputError
from ettin.bench.bundle import assemble
from ettin.bench.gpu_speed import stock_loop
from ettin.bench.gpu_subject import Place, opened, plain_varlen
from ettin.export.source.checkpoint import read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER

PAIRS = [("What is the red planet?", "Mars is called the red planet."), ("Who?", "Nobody knows " * 40)] * 8
# As on a bare machine: neither installed packages of this project, nor what only they need.
BARE = """
import runpy, sys
for name in ("pydantic", "click", "tabulate", "sentence_transformers", "onnx", "onnxruntime", "openvino"):
    sys.modules[name] = None
sys.meta_path = [each for each in sys.meta_path if "editable" not in repr(each).lower()]
sys.path = [each for each in sys.path if "editable" not in each]
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path[0] = script.rpartition("/")[0]
runpy.run_path(script, run_name="__main__")
"""


def run(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("where", [pytest.param("checkout", marks=pytest.mark.slow), "bundle"])
def test_parity_and_speed(where: str, tmp_path: Path) -> None:
    script, pairs = Path(__file__).parents[1] / "bench" / "gpu.py", tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"query": query, "document": text}) + "\n" for query, text in PAIRS))
    arguments = ["--pairs", pairs]
    if where == "bundle":
        size_bytes = assemble(tmp_path / "folder", DEMO_FOLDER, PAIRS)
        assert 1 << 20 < size_bytes < 50 << 20
        script, arguments = tmp_path / "folder" / "ettin" / "bench" / "gpu.py", []
    file = tmp_path / "result.json"
    done = run(script, "--device", "cpu", "--sizes", "tiny", "--minutes", "0.05", "--json", file, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    result = found["result"]
    assert result["text"] == "pairs.jsonl" and found["kind"] == "gpu" and found["machine"]["device"] == "cpu"
    errors = result["parity"]["rows"]
    assert errors["packed graph, fp32"]["max_abs_error"] < 1e-4
    assert 0 < errors["ours"]["of_reference"] <= 1.5 and 0 < errors["packed graph, bf16"]["of_reference"] <= 1.5
    rows = result["sizes"]["tiny"]["rows"]
    assert list(rows) == ["fp32 SDPA", "bf16 SDPA", "bf16 FA2 padded", "bf16 FA2 unpadded", "ours"]
    assert all(row["pairs_per_s"] > 0 and len(row["passes"]) == 3 for row in rows.values())
    assert "bf16 FA2 unpadded (the reference)" in done.stdout and "tiny, random weights" in done.stdout


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "gpu.py"
    done = run(script, "--device", "cpu", "--sizes", "tiny", "--pairs", tmp_path / "missing.jsonl")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "missing.jsonl" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = run(script, "--sizes", "70m")
    assert done.returncode == 2 and "unknown size 70m" in done.stderr


def test_settings_give_the_same_scores() -> None:
    """What is timed is what is right: every setting in fp32, on pairs of many lengths."""
    file = str(DEMO_FOLDER / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token="[PAD]")  # noqa: S106
    pairs = [("a query", "word " * count) for count in (1, 90, 7, 40, 200, 3)]
    place = Place("cpu", plain_varlen)
    found = {}
    with opened(read_checkpoint(DEMO_FOLDER), place) as subject:
        for attention in ("sdpa", "flash-padded", "flash"):
            model = subject.stock(torch.float32, attention)
            found[attention] = stock_loop(model, tokenizer, place, pairs, 4, attention == "flash")
    assert found["sdpa"].std() > 0.1
    for attention in ("flash-padded", "flash"):
        np.testing.assert_allclose(found[attention], found["sdpa"], atol=1e-4)


def test_a_bundle_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ettin.bench.bundle._LIMIT_MIB", 1)
    with pytest.raises(OutputError, match="MiB, expected at most 1: name a smaller checkpoint"):
        assemble(tmp_path / "folder", DEMO_FOLDER, PAIRS)
    assert list(tmp_path.iterdir()) == []
