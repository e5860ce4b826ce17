# system: Optimum ONNX Runtime
# artifact: onnx fp32, int8
# requires: optimum-onnx[onnxruntime]==0.1.0 torch==2.13.0 sentence-transformers==5.7.0 transformers==4.57.6
# largest error: 1e-4, 2e-2
import json
import sys

from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

file = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}[precision]
model = ORTModelForSequenceClassification.from_pretrained(folder, subfolder="onnx", file_name=file)
tokenizer = AutoTokenizer.from_pretrained(folder)
documents = question["documents"]
inputs = tokenizer([question["query"]] * len(documents), documents, padding=True, truncation=True, return_tensors="pt")
print(json.dumps(model(**inputs).logits[:, 0].tolist()))
