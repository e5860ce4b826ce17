"""LangChain's CohereRerank against a rerank service: python langchain_cohere_rerank.py http://localhost:8080."""

import json
import sys

import cohere
import httpx
from langchain_cohere import CohereRerank

QUERY = "Which planet is the Red Planet?"
DOCUMENTS = ["Venus is Earth's twin.", "Mars is the Red Planet.", "Jupiter is the largest planet."]

model = httpx.get(f"{sys.argv[1]}/info").json()["model_id"]
client = cohere.ClientV2("unused", base_url=sys.argv[1])
hits = CohereRerank(client=client, model=model, top_n=None).rerank(DOCUMENTS, QUERY, max_tokens_per_doc=4096)
scores = {hit["index"]: hit["relevance_score"] for hit in hits}
print(json.dumps([scores[index] for index in range(len(DOCUMENTS))]))
