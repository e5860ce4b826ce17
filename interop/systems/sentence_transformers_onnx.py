# system: sentence-transformers, ONNX backend
# artifact: onnx fp32
# requires: sentence-transformers==5.7.0 torch==2.13.0 optimum-onnx[onnxruntime]==0.1.0 transformers==4.57.6
# largest error: 1e-4
import json
import sys

from sentence_transformers import CrossEncoder

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

model = CrossEncoder(folder, backend="onnx", device="cpu", model_kwargs={"file_name": "onnx/model.onnx"})
print(json.dumps(model.predict([(question["query"], document) for document in question["documents"]]).tolist()))
