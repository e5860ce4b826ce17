# /// script
# dependencies = ["haystack-ai>=3"]
# ///
"""A Haystack pipeline over an artifact: prints the scores of its first 64 parity pairs as JSON."""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack import Document, Pipeline

from ettin.runtimes.adapters.for_haystack import EttinRanker

artifact = Path(sys.argv[1])
cases = [json.loads(line) for line in (artifact / "parity.jsonl").read_text("utf-8").split("\n")[:64]]
pipeline = Pipeline()
pipeline.add_component("ranker", EttinRanker(str(artifact), top_k=10))
pipeline = Pipeline.loads(pipeline.dumps(), allowed_modules=["ettin.*"])  # as YAML and back
scores = []
for case in cases:
    documents = [Document(content=case["document"])]
    (hit,) = pipeline.run({"ranker": {"query": case["query"], "documents": documents}})["ranker"]["documents"]
    scores.append(hit.score)
documents = [Document(content=case["document"]) for case in cases]
best = pipeline.run({"ranker": {"query": cases[0]["query"], "documents": documents}})["ranker"]["documents"]
assert len(best) == 10 and [hit.score for hit in best] == sorted((hit.score for hit in best), reverse=True)
pipeline.get_component("ranker").close()
print(json.dumps({"system": "Haystack", "version": version("haystack-ai"), "scores": scores}))
