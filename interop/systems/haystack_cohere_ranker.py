# system: Haystack's CohereRanker
# artifact: openvino fp32
# requires: cohere-haystack==11.0.0
# server: ettin-serve
# score: sigmoid
# largest error: 1e-6
import json
import sys

from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker

url, precision = sys.argv[1:]
question = json.load(sys.stdin)

documents = [Document(content=text, id=str(number)) for number, text in enumerate(question["documents"])]
ranker = CohereRanker(
    model="ettin", api_key=Secret.from_token("unused"), api_base_url=url, top_k=len(documents), max_tokens_per_doc=4096
)
answer = ranker.run(query=question["query"], documents=documents)
scores = {document.id: document.score for document in answer["documents"]}
print(json.dumps([scores[document.id] for document in documents]))
