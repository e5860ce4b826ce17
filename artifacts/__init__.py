"""The artifact format: manifest, files, parity pairs, comparison metrics and errors. Needs no engine."""

from typing import TYPE_CHECKING

from ettin.artifacts.lazy import lazily

if TYPE_CHECKING:
    from ettin.artifacts.errors import EttinError
    from ettin.artifacts.manifest import Manifest
    from ettin.artifacts.opened import OpenArtifact
    from ettin.artifacts.parity import ParityCase, read_parity
    from ettin.artifacts.targets import TARGETS

__all__ = ["TARGETS", "EttinError", "Manifest", "OpenArtifact", "ParityCase", "read_parity"]

__getattr__ = lazily(
    __name__,
    {
        "TARGETS": "ettin.artifacts.targets",
        "EttinError": "ettin.artifacts.errors",
        "Manifest": "ettin.artifacts.manifest",
        "OpenArtifact": "ettin.artifacts.opened",
        "ParityCase": "ettin.artifacts.parity",
        "read_parity": "ettin.artifacts.parity",
    },
)
