# system: fastembed
# artifact: onnx fp32, int8
# requires: fastembed==0.9.1
# largest error: 1e-4, 2e-2
import json
import sys

from fastembed.common.model_description import ModelSource
from fastembed.rerank.cross_encoder import TextCrossEncoder

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

file = {"fp32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}[precision]
source = ModelSource(hf="from/a-folder")  # it asks for one, and does not use it
TextCrossEncoder.add_custom_model(model="ettin", model_file=file, sources=source)
reranker = TextCrossEncoder("ettin", specific_model_path=folder)
print(json.dumps(list(reranker.rerank(question["query"], question["documents"]))))
