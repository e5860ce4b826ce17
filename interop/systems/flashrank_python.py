# system: FlashRank
# artifact: onnx fp32
# requires: flashrank==0.2.10
# largest error: 1e-5
# score: sigmoid
import json
import sys
from pathlib import Path

from flashrank import Ranker, RerankRequest
from flashrank.Ranker import model_file_map

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)

path = Path(folder)
model_file_map[path.name] = "onnx/model.onnx"  # it knows no models but its own
ranker = Ranker(path.name, cache_dir=path.parent, max_length=7999)
passages = [{"id": index, "text": document} for index, document in enumerate(question["documents"])]
ranked = ranker.rerank(RerankRequest(question["query"], passages))
print(json.dumps([float(passage["score"]) for passage in sorted(ranked, key=lambda passage: passage["id"])]))
