# system: LangChain's CohereRerank
# artifact: openvino fp32
# requires: langchain-cohere==0.6.0
# server: ettin-serve
# score: sigmoid
# largest error: 1e-6
import json
import sys

import cohere
from langchain_cohere import CohereRerank

url, precision = sys.argv[1:]
question = json.load(sys.stdin)

client = cohere.ClientV2("unused", base_url=url)
reranker = CohereRerank(client=client, model="ettin", top_n=None)
hits = reranker.rerank(question["documents"], question["query"], max_tokens_per_doc=4096)
scores = {hit["index"]: hit["relevance_score"] for hit in hits}
print(json.dumps([scores[index] for index in range(len(scores))]))
