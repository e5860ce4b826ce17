# system: ONNX Runtime
# artifact: onnx fp32, fp16, int8
# requires: onnxruntime==1.32.0 tokenizers==0.23.3
# largest error: 1e-4, 1e-2, 2e-2
import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

file = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}[precision]
session = onnxruntime.InferenceSession(f"{folder}/onnx/{file}")
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_truncation(7999)
tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
encoded = tokenizer.encode_batch([(question["query"], document) for document in question["documents"]])
feeds = {
    "input_ids": np.array([encoding.ids for encoding in encoded]),
    "attention_mask": np.array([encoding.attention_mask for encoding in encoded]),
}
print(json.dumps(session.run(["logits"], feeds)[0][:, 0].tolist()))
