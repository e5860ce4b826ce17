# system: Cohere's Python client
# artifact: openvino fp32
# requires: cohere==7.3.1
# server: ettin-serve
# score: sigmoid
# largest error: 1e-6
import json
import sys

import cohere

url, precision = sys.argv[1:]
question = json.load(sys.stdin)

client = cohere.ClientV2("unused", base_url=url)
answer = client.rerank(model="ettin", query=question["query"], documents=question["documents"])
scores = {hit.index: hit.relevance_score for hit in answer.results}
print(json.dumps([scores[index] for index in range(len(scores))]))
