"""OpenVINO's cache of compiled models, whose files are checked before they are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ettin.artifacts.errors import OutputError
from ettin.artifacts.files import file_sha256


@contextmanager
def cached_options(folder: Path | None) -> Iterator[dict[str, str]]:
    """Options that make OpenVINO keep what it compiles within the block in `folder`, or take it from there.

    Each form of each graph and weights has its own folder. OpenVINO notices a truncated file but not changed bytes
    (2026.4.1), so each file has its checksum beside it and is dropped if it does not match.
    """
    if folder is None:
        yield {}
        return
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for blob, checksum in _cached(folder):
            if not checksum.exists() or checksum.read_text(encoding="ascii") != file_sha256(blob):
                blob.unlink()
                checksum.unlink(missing_ok=True)
    yield {"CACHE_DIR": str(folder)}
    with _explained(folder):
        for blob, checksum in _cached(folder):
            if not checksum.exists() or checksum.stat().st_mtime_ns < blob.stat().st_mtime_ns:
                checksum.write_text(file_sha256(blob), encoding="ascii")


def _cached(folder: Path) -> list[tuple[Path, Path]]:
    return [(blob, blob.with_suffix(".sha256")) for blob in folder.glob("*.blob")]


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: can't be written ({error.strerror}). Choose another cache_dir") from None
