"""The inference graph: one description of the scorer, executed by torch or written out for an engine.

`scorer` describes the computation with the primitive operations of `ops.Ops`. `torch_ops` executes them; the exporters
write them as ONNX or OpenVINO nodes. `fold` prepares the weights. Only `fold` and `torch_ops` import torch.
"""

from ettin.graph.ops import Ops
from ettin.graph.scorer import GraphForm, Scorer
from ettin.graph.shape import ModelShape

__all__ = ["GraphForm", "ModelShape", "Ops", "Scorer"]
