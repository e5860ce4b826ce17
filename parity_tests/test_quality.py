"""The main job on real input: an artifact reranks SciFact as PyTorch does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ettin.bench.beir import read_beir
from ettin.bench.first_stage import bm25_candidates
from ettin.bench.quality import first_stage_ndcg, rerank_quality
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.reference import load_gold
from ettin.export.source.checkpoint import read_checkpoint
from ettin.runtimes import load


@pytest.mark.parametrize("queries", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_scifact_ndcg_is_the_references(queries: int, shared: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(shared("checkpoints/17m-lexical"))
    assert Export(checkpoint, Options(max_length=512)).run(Job("openvino", "fp32", tmp_path / "artifact"))
    data = read_beir(shared("retrieval/scifact"))
    candidates = bm25_candidates(data, 100, queries)
    assert len(candidates) == queries and all(len(found) == 100 for found in candidates.values())
    with load(tmp_path / "artifact") as runtime:
        ours = rerank_quality(data, candidates, runtime.predict)
    gold = load_gold(checkpoint)
    gold.max_seq_length = 512
    reference = rerank_quality(
        data, candidates, lambda pairs: gold.predict([list(pair) for pair in pairs], activation_fn=torch.nn.Identity())
    )
    assert abs(ours.ndcg10 - reference.ndcg10) <= 0.001
    assert abs(ours.scores - reference.scores).max() <= 2e-3
    assert ours.ndcg10 > 0 and first_stage_ndcg(data, candidates) > 0  # not equal because nothing was ranked
