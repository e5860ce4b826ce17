"""What the longest input takes: memory of a process that has scored it, above one that has scored a short pair."""

import sys
from pathlib import Path

import pytest
from support import in_a_child

from ettin.export import pipeline
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.proof_pairs import ProofPair, natural_pairs
from ettin.export.source.resolve import opened

LIMIT_MIB = 400
MEASURE = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from ettin.runtimes import Batch

def status_mib(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def score(tokens):
    return runtime.score(Batch.of([np.full(tokens, 300, np.int32)], 0))

with load(sys.argv[1], threads=STREAMS, streams=STREAMS) as runtime, ThreadPoolExecutor(STREAMS) as pool:
    list(pool.map(score, [20] * STREAMS))
    idle_mib = status_mib("VmRSS")
    list(pool.map(score, [7999] * STREAMS))
    peak_mib = status_mib("VmHWM") - idle_mib
    list(pool.map(score, [20] * STREAMS))
    print(peak_mib, status_mib("VmRSS") - idle_mib)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


def memory_mib(artifact: Path, streams: int = 1) -> tuple[float, float]:
    """The most above an idle process, and what remains afterwards, in MiB."""
    peak, after = map(float, in_a_child(MEASURE.replace("STREAMS", str(streams)), artifact).split())
    return peak, after


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_longest_pair(demo_artifacts: dict[tuple[str, str], Path], precision: str) -> None:
    """A dense global layer of the embedded checkpoint, which has two heads, stores half a GiB of scores, twice."""
    peak, after = memory_mib(demo_artifacts["onnx", precision])
    assert peak <= LIMIT_MIB and after <= LIMIT_MIB / 4


def test_two_streams(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    peak, _ = memory_mib(demo_artifacts["onnx", "fp32"], streams=2)
    assert peak <= LIMIT_MIB


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_longest_pair_of_17m(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [ProofPair(pair.query, pair.document, 24) for pair in natural_pairs()[:64]]
    monkeypatch.setattr(pipeline, "proof_pairs", lambda extra, ranking: pairs)
    job = Job("onnx", precision, tmp_path / "artifact")
    with opened(size="17m", random_weights=True) as checkpoint:
        assert Export(checkpoint, Options()).run(job) is not None
    peak, after = memory_mib(job.output)
    assert peak <= LIMIT_MIB and after <= LIMIT_MIB / 4
