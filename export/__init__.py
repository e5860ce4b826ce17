"""Checkpoint → artifact. Needs torch at build time; nothing that runs an artifact imports this package."""
