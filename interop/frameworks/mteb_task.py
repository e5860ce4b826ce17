# /// script
# dependencies = ["mteb>=2"]
# ///
"""MTEB evaluates an artifact on a task of its own: prints the scores of the first 64 parity pairs as JSON."""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mteb
from mteb.cache import ResultCache
from mteb.mocks.mock_tasks import MockRerankingTask
from mteb.models import CrossEncoderProtocol

from ettin.runtimes import load
from ettin.runtimes.adapters.for_mteb import EttinCrossEncoder

artifact = Path(sys.argv[1])
cases = [json.loads(line) for line in (artifact / "parity.jsonl").read_text("utf-8").split("\n")[:64]]
with load(artifact) as runtime, tempfile.TemporaryDirectory() as folder:
    model = EttinCrossEncoder(runtime)
    assert isinstance(model, CrossEncoderProtocol)
    results = mteb.evaluate(model, MockRerankingTask(), cache=ResultCache(folder))
    (score,) = (task.get_score() for task in results.task_results)
    assert 0 <= score <= 1 and results.model_name.startswith("ettin-export/")
    batches = [cases[start : start + 16] for start in range(0, 64, 16)]
    queries, documents = (
        [{"text": [case[key] for case in batch]} for batch in batches] for key in ("query", "document")
    )
    scores = model.predict(queries, documents, task_metadata=None, hf_split="test", hf_subset="default").tolist()
print(json.dumps({"system": "MTEB", "version": version("mteb"), "scores": scores}))
