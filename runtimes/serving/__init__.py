"""Artifacts behind a server: requests of many clients in shared batches, over HTTP and in Triton Inference Server."""
