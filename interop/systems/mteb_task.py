# system: MTEB
# artifact: openvino fp32
# requires: mteb==2.26.24 torch==2.13.0 ettin-export[openvino]
# largest error: 1e-4
import json
import sys
import tempfile

import mteb
from mteb.cache import ResultCache
from mteb.mocks.mock_tasks import MockRerankingTask
from mteb.models import CrossEncoderProtocol

from ettin.runtimes import load
from ettin.runtimes.adapters.for_mteb import EttinCrossEncoder

question = json.load(sys.stdin)
texts = question["documents"]

with load(sys.argv[1]) as runtime, tempfile.TemporaryDirectory() as folder:
    model = EttinCrossEncoder(runtime)
    assert isinstance(model, CrossEncoderProtocol)
    results = mteb.evaluate(model, MockRerankingTask(), cache=ResultCache(folder))
    scores = model.predict([{"text": [question["query"]] * len(texts)}], [{"text": texts}]).tolist()
assert 0 <= results.task_results[0].get_score() <= 1
print(json.dumps(scores))
