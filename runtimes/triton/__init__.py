"""Triton Inference Server: model repositories, the model that it runs, and the server."""
