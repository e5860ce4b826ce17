"""Haystack's CohereRanker against a rerank service: python haystack_cohere_ranker.py http://localhost:8080."""

import json
import sys

import httpx
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker

QUERY = "Which planet is the Red Planet?"
DOCUMENTS = ["Venus is Earth's twin.", "Mars is the Red Planet.", "Jupiter is the largest planet."]

model = httpx.get(f"{sys.argv[1]}/info").json()["model_id"]
ranker = CohereRanker(model=model, api_key=Secret.from_token("unused"), api_base_url=sys.argv[1])
answer = ranker.run(query=QUERY, documents=[Document(content=text) for text in DOCUMENTS])
scores = {document.content: document.score for document in answer["documents"]}
print(json.dumps([scores[text] for text in DOCUMENTS]))
