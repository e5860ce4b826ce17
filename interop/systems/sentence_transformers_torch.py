# system: sentence-transformers
# artifact: transformers fp32
# requires: sentence-transformers==6.2.0 torch==2.13.0 optimum-intel[openvino]==2.2.0 transformers==5.5.4
# largest error: 1e-4
import json
import sys

from sentence_transformers import CrossEncoder

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

model = CrossEncoder(folder, device="cpu")
print(json.dumps(model.predict([(question["query"], document) for document in question["documents"]]).tolist()))
