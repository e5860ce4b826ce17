# system: LlamaIndex
# artifact: openvino fp32
# requires: llama-index-core==0.14.25 ettin-export[openvino]
# largest error: 1e-4
import json
import sys

from llama_index.core.schema import NodeWithScore, TextNode

from ettin.runtimes import load
from ettin.runtimes.adapters.for_llama_index import EttinRerank

question = json.load(sys.stdin)
nodes = [NodeWithScore(node=TextNode(text=text, id_=str(number))) for number, text in enumerate(question["documents"])]

with load(sys.argv[1]) as runtime:
    best = EttinRerank(runtime, top_n=len(nodes)).postprocess_nodes(nodes, query_str=question["query"])
assert [node.score for node in best] == sorted((node.score for node in best), reverse=True)
print(json.dumps([node.score for node in sorted(best, key=lambda node: int(node.node_id))]))
