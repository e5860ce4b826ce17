"""LiteLLM's rerank providers against a rerank service: python litellm_rerank.py http://localhost:8080."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # prices come with the package

import httpx
import litellm

QUERY = "Which planet is the Red Planet?"
DOCUMENTS = ["Venus is Earth's twin.", "Mars is the Red Planet.", "Jupiter is the largest planet."]

model = httpx.get(f"{sys.argv[1]}/info").json()["model_id"]
scores = {}
for provider in ("huggingface", "infinity", "hosted_vllm", "jina_ai", "cohere"):
    for return_documents in (True, False):
        # LiteLLM expects Infinity's documents to be strings, and vLLM's, on the same route, to be objects.
        wants_texts = return_documents and provider != "infinity"
        answer = litellm.rerank(
            model=f"{provider}/{model}",
            query=QUERY,
            documents=DOCUMENTS,
            top_n=3,
            return_documents=wants_texts,
            api_base=sys.argv[1],
            api_key="unused",
        )
        by_index = {hit["index"]: hit["relevance_score"] for hit in answer.results}
        if wants_texts:
            assert all(hit["document"]["text"] == DOCUMENTS[hit["index"]] for hit in answer.results), answer
        scores[f"{provider}{'' if return_documents else ', scores alone'}"] = [by_index[index] for index in range(3)]
assert len({str(values) for values in scores.values()}) == 1, scores
print(json.dumps(scores["huggingface"]))
