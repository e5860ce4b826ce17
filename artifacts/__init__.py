"""The artifact format: manifest, files, parity pairs, comparison metrics and errors. Needs no engine."""

from typing import TYPE_CHECKING

from ettin.artifacts.lazy import lazily

if TYPE_CHECKING:
    from ettin.artifacts.errors import EttinError
    from ettin.artifacts.files import check_files
    from ettin.artifacts.manifest import Manifest
    from ettin.artifacts.parity import ParityCase, read_parity
    from ettin.artifacts.targets import TARGETS

__all__ = ["TARGETS", "EttinError", "Manifest", "ParityCase", "check_files", "read_parity"]

__getattr__ = lazily(
    __name__,
    {
        "TARGETS": "ettin.artifacts.targets",
        "EttinError": "ettin.artifacts.errors",
        "Manifest": "ettin.artifacts.manifest",
        "ParityCase": "ettin.artifacts.parity",
        "check_files": "ettin.artifacts.files",
        "read_parity": "ettin.artifacts.parity",
    },
)
