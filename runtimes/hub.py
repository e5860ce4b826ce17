"""Artifacts on the Hugging Face hub: what a hub id names, and its download.

Nothing that the hub answers is trusted. The manifest is checked before any other file is asked for, only the files that
it lists are downloaded, none is larger than it says, and each is compared with its checksum before it gets its place.
The hub's own client would name files in its cache after headers of the answer; here the names are the manifest's.
"""

import io
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ettin.artifacts.errors import (
    DamagedArtifact,
    DownloadError,
    EttinError,
    ManifestError,
    MissingDependency,
    OutputError,
)
from ettin.artifacts.files import file_sha256
from ettin.artifacts.manifest import CARD_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest
from ettin.artifacts.signatures import MAX_SIGNATURE_BYTES, SIGNATURE_NAME

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:@({_PART}))?((?:/{_PART})*)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_FILES = 1000
_MAX_CARD_BYTES = 1 << 20
_FIRST_ANSWER_S = 3.0

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@contextmanager
def reached(what: str, otherwise: str) -> Iterator[None]:
    """Turns whatever goes wrong with the hub into one line, and keeps its client from printing lines of its own.

    Args:
        what: what is fetched or sent.
        otherwise: what the user can do if the hub can't be reached.

    Raises:
        DownloadError: the hub can't be reached, or refuses.
    """
    from huggingface_hub import errors

    refusals = {  # the first that matches: a gated repository is also one that is not found
        errors.GatedRepoError: "the hub asks you to accept its terms first. Visit its page and run: hf auth login",
        errors.RepositoryNotFoundError: "no such repository on the hub, or a private one. Run: hf auth login",
        errors.RevisionNotFoundError: "the hub has no such revision. Leave it out for the newest",
        errors.HFValidationError: "neither a folder here nor a hub id",
    }
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    except EttinError:
        raise
    except tuple(refusals) as error:
        reason = next(text for kind, text in refusals.items() if isinstance(error, kind))
        raise DownloadError(f"{what}: {reason}") from None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        # errors.HTTPError is that of the HTTP library which the installed client uses; an upload ends in RuntimeError.
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            raise OutputError(
                f"{what}: the hub's cache can't be used ({error}). Choose another folder for it: HF_HOME=DIR"
            ) from None
        problem = "refuses" if isinstance(error, errors.HfHubHTTPError) else "can't be reached"
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise DownloadError(f"{what}: the hub {problem} ({reason}). {otherwise}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # its client reads JSON of any form
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DownloadError(f"{what}: the answer is not one of the model hub ({reason}). {otherwise}") from None
    finally:
        client.setLevel(level)


def first_answer(ask: Callable[[], _Result]) -> _Result:
    """What the hub answers to a first request.

    A name server that is silent, or a host with several addresses, takes longer than any time limit of the client.

    Raises:
        TimeoutError: no answer within 3 s, or the seconds in HF_HUB_ETAG_TIMEOUT, the client's own limit.
    """
    answer: Future[_Result] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    limit_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _FIRST_ANSWER_S)
    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(limit_s)
    except TimeoutError:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None


def parsed(name: str) -> tuple[str, str | None, str] | None:
    """Repository, revision (None: the newest) and folder ("": the top) of a hub id; None: not one."""
    match = _ID.fullmatch(name)
    return (match[1], match[2], match[3][1:]) if match else None


def located(name: str | Path) -> Path:
    """The folder of an artifact: one that is here, or else what a hub id names, downloaded if it is not in the cache.

    Args:
        name: a path, or ORGANISATION/NAME[@REVISION][/FOLDER]. A folder here wins, and so does a name without a
            revision whose first part is here. A revision of 40 hex digits is a commit, which is not asked for when it
            is in the cache.

    Raises:
        ManifestError: neither a folder here nor a hub id, or the hub's manifest is not valid.
        DamagedArtifact: the hub gives other files than the manifest lists.
        DownloadError: the hub can't be reached, or has no such artifact.
        MissingDependency: the hub's client is not installed.
    """
    path, parts = Path(name), parsed(str(name))
    if parts is None and not os.path.lexists(path):
        raise ManifestError(
            f"{name}: no such folder, and not a hub id (ORGANISATION/NAME[@REVISION][/FOLDER]). Make an artifact: "
            "ettin-export --size demo"
        )
    repository, revision, below = parts or ("", None, "")
    if parts is None or os.path.lexists(path) or (revision is None and os.path.lexists(path.parts[0])):
        return path
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise MissingDependency(f"{name}: no such folder here, so a hub id, which", "huggingface-hub", "hub") from None
    is_pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    if is_pinned and (cached := Remote(repository, str(revision), below)).is_complete():
        return cached.folder
    otherwise = "Pin a commit that is in the cache: ORGANISATION/NAME@COMMIT, or pass a folder"
    with reached(str(name), otherwise):
        commit = _commit(repository, revision)
        if is_pinned and commit != revision:
            raise DownloadError(f"{name}: the hub gives commit {commit} instead")
        remote = Remote(repository, commit, below)
        if not remote.is_complete():
            remote.download()
    if not is_pinned:
        _log.warning("%s: commit %s. To load the same again: %s", name, commit, remote.name)
    return remote.folder


def _commit(repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    return checked_commit(repository, first_answer(lambda: HfApi().model_info(repository, revision=revision)).sha)


def checked_commit(repository: str, commit: object) -> str:
    """A commit that the hub names, which becomes the name of a folder; raises `DownloadError`."""
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise DownloadError(f"{repository}: the hub names the commit {commit!r:.80}, expected 40 hex digits")
    return commit


class _Bounded(io.BufferedWriter):
    """A new file that is not filled beyond a limit."""

    def __init__(self, path: Path, limit_bytes: int, name: str) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self._limit_bytes, self._name = limit_bytes, name

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > self._limit_bytes:
            raise DamagedArtifact(f"{self._name}: the hub gives more than the {self._limit_bytes} bytes expected")
        return super().write(content)


@dataclass(frozen=True)
class Remote:
    """An artifact on the hub."""

    repository: str
    commit: str
    below: str  # its folder in the repository; "": the top

    @property
    def name(self) -> str:
        """The hub id that names it for ever."""
        return f"{self.repository}@{self.commit}" + (f"/{self.below}" if self.below else "")

    @property
    def cache(self) -> Path:
        """The folder of the repository in the cache of the hub's client."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """The artifact in the cache, where the hub's client would have it, too."""
        return self.cache / "snapshots" / self.commit / self.below

    def is_complete(self) -> bool:
        """Whether the cache has all of it; contents are compared when it is loaded."""
        try:
            return all(map(self._has, Manifest.read(self.folder).files))
        except ManifestError:
            return False

    def download(self) -> None:
        """Puts it into the cache, the manifest last."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ettin-", dir=self.cache) as scratch:
            content = self._fetched(MANIFEST_NAME, MAX_MANIFEST_BYTES, Path(scratch) / MANIFEST_NAME)
            manifest = Manifest.from_bytes(content.read_bytes(), Path(self.name))
            self._check_room(manifest.files)
            for entry in manifest.files:
                if not self._has(entry):
                    self._place(self._fetched(entry.path, entry.size_bytes, Path(scratch) / "part", entry), entry.path)
            with suppress(DownloadError):  # not signed
                part = self._fetched(SIGNATURE_NAME, MAX_SIGNATURE_BYTES, Path(scratch) / SIGNATURE_NAME)
                self._place(part, SIGNATURE_NAME)
            self._place(content, MANIFEST_NAME)

    def card(self) -> str:
        """The card at the top of the repository."""
        with tempfile.TemporaryDirectory() as scratch:
            part = self._fetched(CARD_NAME, _MAX_CARD_BYTES, Path(scratch) / CARD_NAME)
            return part.read_text(encoding="utf-8", errors="replace")

    def _has(self, entry: FileEntry) -> bool:
        try:
            return (self.folder / entry.path).stat().st_size == entry.size_bytes
        except OSError:
            return False

    def _check_room(self, files: Sequence[FileEntry]) -> None:
        need, free = sum(entry.size_bytes for entry in files), shutil.disk_usage(self.cache).free
        if len(files) > _MAX_FILES:
            raise ManifestError(f"{self.name}: its manifest lists {len(files)} files, expected at most {_MAX_FILES}")
        if need > free:
            raise OutputError(
                f"{self.name}: {free >> 20} MiB free in {self.cache}, its manifest lists {need >> 20}. Choose another "
                "folder for the hub's cache: HF_HOME=DIR"
            )

    def _fetched(self, name: str, limit_bytes: int, part: Path, entry: FileEntry | None = None) -> Path:
        """Downloads a file to `part` and compares it with its entry in the manifest."""
        from huggingface_hub import errors, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        shown_name = f"{self.name}/{name}"
        url = hf_hub_url(self.repository, f"{self.below}/{name}".lstrip("/"), revision=self.commit)
        with _Bounded(part, limit_bytes, shown_name) as file:
            try:
                http_get(url, file, headers=build_hf_headers(), displayed_filename=name)
            except errors.EntryNotFoundError:
                hint = "If it is in a folder of the repository: ORGANISATION/NAME/FOLDER" if entry is None else ""
                raise DownloadError(f"{shown_name}: the hub has no such file. {hint}".rstrip()) from None
        if entry is not None and file_sha256(part) != entry.sha256:
            raise DamagedArtifact(
                f"{shown_name}: the hub gives another file than {MANIFEST_NAME} lists ({part.stat().st_size} bytes, "
                f"expected {entry.size_bytes}; sha256 differs). Load another revision, or ask its publisher"
            )
        return part

    def _place(self, part: Path, name: str) -> None:
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)
