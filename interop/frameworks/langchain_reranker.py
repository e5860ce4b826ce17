# /// script
# dependencies = ["langchain-classic>=1"]
# ///
"""LangChain's CrossEncoderReranker over an artifact: prints the scores of its first 64 parity pairs as JSON."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.documents import Document

from ettin.runtimes import load
from ettin.runtimes.adapters.for_langchain import EttinCrossEncoder

artifact = Path(sys.argv[1])
cases = [json.loads(line) for line in (artifact / "parity.jsonl").read_text("utf-8").split("\n")[:64]]
with load(artifact) as runtime:
    model = EttinCrossEncoder(runtime)
    scores = model.score([(case["query"], case["document"]) for case in cases])
    query, texts = cases[0]["query"], [case["document"] for case in cases]
    reranker = CrossEncoderReranker(model=model, top_n=10)
    best = reranker.compress_documents([Document(page_content=text) for text in texts], query)
    assert [document.page_content for document in best] == [
        hit["text"] for hit in runtime.rank(query, texts, top_k=10, return_documents=True)
    ]
print(json.dumps({"system": "LangChain", "version": version("langchain-classic"), "scores": scores}))
