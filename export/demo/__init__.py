"""The embedded default checkpoint (`--size demo`), in the published modular format."""
