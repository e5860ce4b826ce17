"""Work of a pair, peaks of a machine, and where an openvino artifact spends its time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support import TINY

from ettin.artifacts.errors import UsageError
from ettin.bench import peaks
from ettin.bench.cli import command
from ettin.bench.peaks import cpu_peaks, pair_flops, peak_gops, profiled
from ettin.export.source.sizes import SIZES
from ettin.runtimes import load
from ettin.runtimes.batch import Batch
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime

Artifacts = dict[tuple[str, str], Path]


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """How large the products are decides how near to the machine's peak they come, and nothing else."""
    monkeypatch.setattr(peaks, "_CPU_SIZES", (512,))


def test_work_of_a_pair_by_counting() -> None:
    for shape, tokens in ((TINY, 5), (TINY, 300), (SIZES["17m"].shape, 200)):
        position = np.arange(tokens)
        near = float((abs(position[:, None] - position) <= shape.window_tokens).sum())
        weights = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
        expected = 2.0 * tokens * weights * shape.num_layers
        for is_global in shape.global_layers:
            expected += 4.0 * shape.hidden_size * (tokens**2 if is_global else near)
        assert pair_flops(shape, tokens) == expected
    assert pair_flops(TINY, 0) == 0


def test_profile_counts_the_linear_layers(demo_artifacts: Artifacts) -> None:
    with load(demo_artifacts["openvino", "int8"]) as runtime:
        assert isinstance(runtime, OpenVinoRuntime)
        parts = profiled(runtime, Batch.of([np.arange(5, 53, dtype=np.int32)] * 2, 0))
        has_kernels = runtime._tables is not None
    # 7 layers of 7 linear layers: H 128, I 192; six for 96 tokens, the last for k and v, and for CLS the rest. With our
    # kernels, the first q, k and v are in tables, and the last v is a product in floats for CLS.
    weights = {"q": 1, "k": 1, "v": 1, "o": 1, "up": 1.5, "gate": 1.5, "down": 1.5}
    tokens, pairs = 96, 2
    expected = sum(2 * 128 * 128 * each * 6 * tokens for each in weights.values())
    expected += 2 * 128 * 128 * ((2 - 4 * has_kernels) * tokens + (1 + 1 + 4.5) * pairs)
    assert parts["int8 linear"].operations == pytest.approx(expected)
    assert (
        parts["int8 linear"].nodes == 49 - 4 * has_kernels
        and parts["float linear"].nodes == 2 + has_kernels
        and "attention" in parts
    )
    assert peak_gops("f32", int8=True) > 1 and peak_gops("f32", int8=False) > 1


def test_peaks_by_precision() -> None:
    assert {"fp32", "int8"} <= cpu_peaks().keys() <= {"fp32", "int8", "bf16"}


def test_profile_command(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    def profile(target: str, precision: str) -> Any:
        options = ("--pairs", "2", "--json", str(tmp_path / "p.json"))
        return CliRunner().invoke(command, ["profile", str(demo_artifacts[target, precision]), *options])

    done = profile("openvino", "int8")
    assert done.exit_code == 0, done.output
    assert "of peak" in done.stdout and "one thread" in done.stdout
    assert json.loads((tmp_path / "p.json").read_text())["result"]["peak_gops"]["int8 linear"] > 0
    refused = profile("onnx", "fp32").exception
    assert isinstance(refused, UsageError) and "only 'openvino' can be profiled" in str(refused)
