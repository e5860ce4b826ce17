"""The paths through which this project uses a GPU, and the measurements that prove them.

A path without a result file is experimental, and lists, the doctor, manifests, cards and `load` say so. A mark is
lifted by naming the file here once a visit to a machine with a GPU has written it; a test refuses a mark that the files
in `bench/results/` contradict, in both directions.
"""

# A target, or a target and a device as under the entry-point group `ettin.devices` → a file in `bench/results/` of the
# kind "gpu-visit" whose `result.paths` has the path with `passed: true`; None: no card has run it.
PROOFS: dict[str, str | None] = {
    "onnx.cuda": None,
    "onnx.trt-rtx": None,
    "transformers.cuda": None,
    "trt": None,
    "trt-rtx": None,
}

NOT_RUN = "not yet run on a GPU"


def mark(path: str) -> str:
    """Why the path is experimental, as `ettin.artifacts.targets.Component` takes it; "" for one that is proven."""
    return NOT_RUN if PROOFS[path] is None else ""
