# system: transformers
# artifact: transformers fp32
# requires: transformers==5.5.4 torch==2.13.0 optimum-intel[openvino]==2.2.0 sentence-transformers==6.2.0
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
