# system: transformers 4
# artifact: transformers fp32
# requires: transformers==4.57.6 torch==2.13.0 optimum-onnx[onnxruntime]==0.1.0 sentence-transformers==5.7.0
# largest error: 1e-4
import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

model = AutoModelForSequenceClassification.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
documents = question["documents"]
inputs = tokenizer([question["query"]] * len(documents), documents, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    print(json.dumps(model(**inputs).logits[:, 0].tolist()))
