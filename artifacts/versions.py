"""Versions of installed packages."""

import importlib.metadata
from collections.abc import Iterable


def installed_version(package: str) -> str:
    """Version of a distribution, or that it is not installed."""
    return installed_versions([package]).get(package, "not installed at export")


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Version by distribution name, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
