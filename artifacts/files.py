"""The files of an artifact: listing them when it is written, checking them when it is read."""

from pathlib import Path

from ettin.artifacts.checksum import file_sha256
from ettin.artifacts.errors import DamagedArtifact, OutputError
from ettin.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder` but the manifest, in order of their paths.

    Raises:
        OutputError: something there is neither file nor folder, such as a link that could lead outside.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise OutputError(f"{path}: an artifact holds plain files only")
        if path.is_file() and name != MANIFEST_NAME:
            entries.append(file_entry(folder, name))
    return tuple(entries)


def file_entry(folder: Path, name: str) -> FileEntry:
    """What the manifest says of one file, `name` relative to `folder`."""
    path = folder / name
    return FileEntry(path=name, size_bytes=path.stat().st_size, sha256=file_sha256(path))


def check_files(folder: Path, manifest: Manifest, checksums: bool = True) -> None:
    """Compares the files with the manifest.

    Args:
        folder: the artifact.
        manifest: its manifest.
        checksums: also read every file; otherwise names and sizes only.

    Raises:
        DamagedArtifact: names the first file that is missing or differs, and how to get it back.
    """
    again = f"Export again: {manifest.command}"
    listed = {entry.path for entry in manifest.files}
    if manifest.entry not in listed:
        raise DamagedArtifact(f"{folder}: the entry '{manifest.entry}' is not among its files. {again}")
    for entry in manifest.files:
        path = folder / entry.path
        if path.is_symlink() or not path.is_file():
            raise DamagedArtifact(f"{path}: missing, but listed in {MANIFEST_NAME}. {again}")
        size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise DamagedArtifact(f"{path}: {size_bytes} bytes, {MANIFEST_NAME} says {entry.size_bytes}. {again}")
        if checksums and file_sha256(path) != entry.sha256:
            raise DamagedArtifact(f"{path}: sha256 differs from {MANIFEST_NAME} (file damaged or edited). {again}")
