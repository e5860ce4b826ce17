# system: OpenVINO GenAI
# artifact: openvino fp32
# requires: openvino-genai==2026.4.1.0
# largest error: 1e-5
# score: sigmoid
import json
import sys

from openvino_genai import TextRerankPipeline

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

documents = question["documents"]
pipeline = TextRerankPipeline(
    f"{folder}/openvino", "CPU", top_n=len(documents), INFERENCE_PRECISION_HINT="f32"
)  # without top_n it returns three
scores = dict(pipeline.rerank(question["query"], documents))
print(json.dumps([scores[index] for index in range(len(documents))]))
