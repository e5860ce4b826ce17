# system: LiteLLM (five of its rerank providers)
# artifact: openvino fp32
# requires: litellm==1.110.2
# server: ettin-serve
# score: sigmoid
# largest error: 1e-6
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # prices come with the package

import litellm

url, precision = sys.argv[1:]
question = json.load(sys.stdin)
query, documents = question["query"], question["documents"]

scores = {}
for provider in ("huggingface", "infinity", "hosted_vllm", "jina_ai", "cohere"):
    # LiteLLM expects Infinity's documents to be strings, and vLLM's, on the same route, to be objects.
    wants_texts = provider != "infinity"
    answer = litellm.rerank(
        model=f"{provider}/ettin",
        query=query,
        documents=documents,
        top_n=len(documents),
        return_documents=wants_texts,
        api_base=url,
        api_key="unused",
    )
    by_index = {hit["index"]: hit for hit in answer.results}
    if wants_texts:
        assert all(hit["document"]["text"] == documents[index] for index, hit in by_index.items()), answer
    scores[provider] = [by_index[index]["relevance_score"] for index in range(len(documents))]
assert len({str(values) for values in scores.values()}) == 1, scores
print(json.dumps(scores["huggingface"]))
