"""Triton Inference Server: model repositories, the model that it runs, and the server."""

ARTIFACT = "artifact"  # the folder of the artifact in a version of a model
