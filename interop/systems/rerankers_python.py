# system: rerankers
# artifact: transformers fp32
# requires: rerankers==0.10.0 torch==2.13.0 transformers==5.5.4
# largest error: 1e-4
import json
import sys

import torch
from rerankers import Reranker

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

# Its default is fp16 on some devices.
ranker = Reranker(folder, model_type="cross-encoder", device="cpu", dtype=torch.float32, verbose=0)
results = ranker.rank(query=question["query"], docs=question["documents"]).results
print(json.dumps([result.score for result in sorted(results, key=lambda result: result.document.doc_id)]))
