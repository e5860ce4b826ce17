# system: sentence-transformers, OpenVINO backend
# artifact: openvino fp32
# requires: sentence-transformers==6.2.0 torch==2.13.0 optimum-intel[openvino]==2.2.0 transformers==5.5.4
# largest error: 1e-4
import json
import sys

from sentence_transformers import CrossEncoder

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

# Without the hint, OpenVINO computes in bf16 where the processor has it.
options = {"file_name": "openvino/openvino_model.xml", "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
model = CrossEncoder(folder, backend="openvino", device="cpu", model_kwargs=options)
print(json.dumps(model.predict([(question["query"], document) for document in question["documents"]]).tolist()))
