# system: OpenVINO with its own tokenizer
# artifact: openvino fp32
# requires: openvino-tokenizers==2026.4.1.0
# largest error: 1e-4
import json
import sys

import numpy as np
import openvino
import openvino_tokenizers  # noqa: F401 (it adds the tokenizer's operations to OpenVINO)

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

core = openvino.Core()
tokenizer = core.compile_model(f"{folder}/openvino/openvino_tokenizer.xml", "CPU")
model = core.compile_model(f"{folder}/openvino/openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
documents = question["documents"]
inputs = tokenizer([np.array([question["query"]] * len(documents)), np.array(documents)])
inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
print(json.dumps(model(inputs)["logits"][:, 0].tolist()))
