# system: txtai
# artifact: transformers fp32
# requires: txtai==9.14.0 torch==2.13.0 transformers==5.5.4
# largest error: 1e-5
# score: sigmoid
import json
import sys

from txtai.pipeline import CrossEncoder

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

encoder = CrossEncoder(folder, gpu=False)
print(json.dumps([score for _, score in sorted(encoder(question["query"], question["documents"]))]))
