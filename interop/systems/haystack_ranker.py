# system: Haystack
# artifact: openvino fp32
# requires: haystack-ai==3.4.1 ettin-export[openvino]
# largest error: 1e-4
import json
import sys

from haystack import Document, Pipeline

from ettin.runtimes.adapters.for_haystack import EttinRanker

question = json.load(sys.stdin)
documents = [Document(content=text, id=str(number)) for number, text in enumerate(question["documents"])]

pipeline = Pipeline()
pipeline.add_component("ranker", EttinRanker(sys.argv[1], top_k=len(documents)))
pipeline = Pipeline.loads(pipeline.dumps(), allowed_modules=["ettin.*"])  # as text and back
best = pipeline.run({"ranker": {"query": question["query"], "documents": documents}})["ranker"]["documents"]
pipeline.get_component("ranker").close()
assert [document.score for document in best] == sorted((document.score for document in best), reverse=True)
print(json.dumps([document.score for document in sorted(best, key=lambda document: int(document.id))]))
