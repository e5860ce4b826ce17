"""`ettin-bench`."""
