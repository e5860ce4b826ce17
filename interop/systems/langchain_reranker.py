# system: LangChain
# artifact: openvino fp32
# requires: langchain-classic==1.0.8 ettin-export[openvino]
# largest error: 1e-4
import json
import sys

from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.documents import Document

from ettin.runtimes import load
from ettin.runtimes.adapters.for_langchain import EttinCrossEncoder

question = json.load(sys.stdin)
query, texts = question["query"], question["documents"]

with load(sys.argv[1]) as runtime:
    model = EttinCrossEncoder(runtime)
    reranker = CrossEncoderReranker(model=model, top_n=2)
    best = reranker.compress_documents([Document(page_content=text) for text in texts], query)
    scores = model.score([(query, text) for text in texts])
assert best[0].page_content == texts[scores.index(max(scores))]
print(json.dumps(scores))
