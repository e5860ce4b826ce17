# /// script
# dependencies = ["llama-index-core>=0.14"]
# ///
"""A LlamaIndex postprocessor over an artifact: prints the scores of its first 64 parity pairs as JSON."""

import asyncio
import json
import sys
from importlib.metadata import version
from pathlib import Path

from llama_index.core.schema import NodeWithScore, TextNode

from ettin.runtimes import load
from ettin.runtimes.adapters.for_llama_index import EttinRerank

artifact = Path(sys.argv[1])
cases = [json.loads(line) for line in (artifact / "parity.jsonl").read_text("utf-8").split("\n")[:64]]
with load(artifact) as runtime:
    reranker = EttinRerank(runtime, top_n=10)
    scores = []
    for case in cases:
        (hit,) = reranker.postprocess_nodes(
            [NodeWithScore(node=TextNode(text=case["document"]))], query_str=case["query"]
        )
        scores.append(hit.score)
    nodes = [NodeWithScore(node=TextNode(text=case["document"]), score=0.5) for case in cases]
    best = asyncio.run(reranker.apostprocess_nodes(nodes, query_str=cases[0]["query"]))
    assert len(best) == 10 and [hit.score for hit in best] == sorted((hit.score for hit in best), reverse=True)
    assert all(node.score == 0.5 for node in nodes), "the caller's nodes were changed"
print(json.dumps({"system": "LlamaIndex", "version": version("llama-index-core"), "scores": scores}))
