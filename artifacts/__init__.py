"""The artifact format: manifest, files, parity pairs, comparison metrics and errors. Needs no engine."""

from typing import TYPE_CHECKING

from ettin.artifacts.lazy import lazily

if TYPE_CHECKING:
    from ettin.artifacts.errors import EttinError
    from ettin.artifacts.manifest import Manifest
    from ettin.artifacts.opened import OpenArtifact
    from ettin.artifacts.parity import ParityCase, read_parity
    from ettin.artifacts.targets import Target, target_named, targets

__all__ = ["EttinError", "Manifest", "OpenArtifact", "ParityCase", "Target", "read_parity", "target_named", "targets"]

__getattr__ = lazily(
    __name__,
    {
        "Target": "ettin.artifacts.targets",
        "target_named": "ettin.artifacts.targets",
        "targets": "ettin.artifacts.targets",
        "EttinError": "ettin.artifacts.errors",
        "Manifest": "ettin.artifacts.manifest",
        "OpenArtifact": "ettin.artifacts.opened",
        "ParityCase": "ettin.artifacts.parity",
        "read_parity": "ettin.artifacts.parity",
    },
)
