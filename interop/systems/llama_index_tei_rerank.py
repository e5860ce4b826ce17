# system: LlamaIndex's TextEmbeddingInference
# artifact: openvino fp32
# requires: llama-index-postprocessor-tei-rerank==0.6.0
# server: ettin-serve
# score: sigmoid
# largest error: 1e-6
import json
import sys

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

url, precision = sys.argv[1:]
question = json.load(sys.stdin)

nodes = [NodeWithScore(node=TextNode(text=text, id_=str(number))) for number, text in enumerate(question["documents"])]
reranker = TextEmbeddingInference(base_url=url, top_n=len(nodes), model_name="ettin")
best = reranker.postprocess_nodes(nodes, query_str=question["query"])
print(json.dumps([node.score for node in sorted(best, key=lambda node: int(node.node_id))]))
