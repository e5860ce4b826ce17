# system: Optimum Intel
# artifact: openvino fp32
# requires: optimum-intel[openvino]==2.2.0 torch==2.13.0 sentence-transformers==6.2.0 transformers==5.5.4
# largest error: 1e-4
import json
import sys

from optimum.intel import OVModelForSequenceClassification
from transformers import AutoTokenizer

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

# Without `subfolder` it wants to convert the model itself, which it refuses for modernbert.
model = OVModelForSequenceClassification.from_pretrained(
    folder, subfolder="openvino", export=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"}
)
tokenizer = AutoTokenizer.from_pretrained(folder)
documents = question["documents"]
inputs = tokenizer([question["query"]] * len(documents), documents, padding=True, truncation=True, return_tensors="pt")
print(json.dumps(model(**inputs).logits[:, 0].tolist()))
