"""The artifact format: manifest, files, parity pairs, comparison metrics and errors. Needs no engine."""

from ettin.artifacts.errors import EttinError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.parity import ParityCase, read_parity
from ettin.artifacts.targets import Target, registered_targets, target_named

__all__ = [
    "EttinError",
    "Manifest",
    "OpenArtifact",
    "ParityCase",
    "Target",
    "read_parity",
    "registered_targets",
    "target_named",
]
