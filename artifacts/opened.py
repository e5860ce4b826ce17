"""An artifact that is open for reading: its contents are compared with its manifest while they are read."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self

from ettin.artifacts.errors import DamagedArtifact, OutputError, UsageError
from ettin.artifacts.files import CheckedFile, file_entry
from ettin.artifacts.folder import Kind
from ettin.artifacts.manifest import CARD_NAME, MANIFEST_NAME, FileEntry, Manifest, manifest_bytes, opened_folder
from ettin.artifacts.precisions import in_precision
from ettin.artifacts.signatures import SIGNATURE_NAME, check_signed, read_signature, signature, signed_digests

TOKENIZER_NAME = "tokenizer.json"

_PART_SUFFIX = ".new"
# Never read, and no part of the artifact: the card, which people may edit; what the hub's client leaves in a folder
# that it downloads to; and what a process leaves that is killed while it replaces the manifest or the signature.
_IGNORED = frozenset({CARD_NAME, ".gitattributes", MANIFEST_NAME + _PART_SUFFIX, SIGNATURE_NAME + _PART_SUFFIX})
_IGNORED_FOLDERS = frozenset({".cache/huggingface"})
_KINDS: dict[Kind, str] = {"file": "a file", "folder": "a folder", "link": "a link", "other": "a special file"}


class OpenArtifact:
    """An artifact's folder, opened once; close it or use it as a context manager.

    Opening reads the manifest. `check` compares the folder with it. The methods that read or copy files hash the very
    bytes that they give, so nothing can change between a check and a use. They raise `DamagedArtifact` if the manifest
    does not list the file, or the file is missing or differs. If the folder is replaced, the old one stays open.

    Args:
        path: the folder; links on the way to it are followed, links below it are refused (see `Folder`).
        checksums: compare contents with the manifest; False: names and sizes only.
        trusted_key: PEM file with a public key whose holder must have signed the manifest and the checksums in it.
        precision: the one that `manifest` describes, of several in the folder; None: the first.

    Raises:
        SignatureError: a key is given and the artifact is not signed by it as it is.
        UsageError: not such a key, or a key without checksums; no such precision.
        ManifestError: no manifest, not a valid one, or an edited one.
        NewerFormat: a newer version of this project wrote it.
    """

    def __init__(
        self, path: Path, *, checksums: bool = True, trusted_key: Path | None = None, precision: str | None = None
    ) -> None:
        if trusted_key is not None and not checksums:
            raise UsageError("a signature proves nothing without checksums. Leave out checksums=False or trusted_key")
        self.path, self._checksums = path, checksums
        self._folder = opened_folder(path)
        try:
            self.manifest_bytes = manifest_bytes(self._folder, path)
            signed = None
            if trusted_key is not None:
                signed = signed_digests(self.signature, self.manifest_bytes, trusted_key, path)
            self.whole_manifest = Manifest.from_bytes(self.manifest_bytes, path)
            self.manifest = in_precision(self.whole_manifest, precision)
            if signed is not None:
                check_signed(signed, ((entry.path, entry.sha256) for entry in self.manifest.files), path)
        except BaseException:
            self._folder.close()
            raise
        self._listed = {entry.path: entry for entry in self.manifest.files}
        self._hashed: set[str] = set()

    @property
    def signature(self) -> bytes | None:
        """Content of the signature, not verified; None: not signed. Raises `SignatureError` if it can't be read."""
        return read_signature(self._folder, self.path)

    def sign(self, private_key: Path) -> None:
        """Compares all contents with the manifest and writes the signature, in place of one that is there.

        Raises:
            DamagedArtifact: a file differs from the manifest.
            OutputError: the signature can't be written.
            UsageError: no such key.
        """
        self.check_contents()
        self._replace(SIGNATURE_NAME, signature(self.manifest_bytes, self.manifest, private_key))

    def check(self) -> None:
        """Compares the files of the folder with the manifest: names, kinds and sizes, but no contents.

        Raises:
            DamagedArtifact: names the first file that is missing, has another size, is a link, or is not listed.
        """
        manifest = self.manifest
        if manifest.entry not in self._listed:
            raise DamagedArtifact(f"{self.path}: the entry '{manifest.entry}' is not among its files. {self._again}")
        tokenizer = self._listed.get(TOKENIZER_NAME)
        if tokenizer is None or tokenizer.sha256 != manifest.tokenizer.sha256:
            raise DamagedArtifact(f"{self.path}: '{TOKENIZER_NAME}' is not the manifest's tokenizer. {self._again}")
        for entry in manifest.files:
            with self._opened(entry):
                pass
        self._refuse_unlisted()

    def check_contents(self) -> None:
        """Compares the contents of those files that were not read yet."""
        for name in self._listed if self._checksums else ():
            if name not in self._hashed:
                with self.stream(name) as file:
                    while file.read(1 << 20):
                        pass

    def listed(self, name: str) -> FileEntry:
        """The manifest's entry for a file."""
        if name not in self._listed:
            raise self._damaged(name, f"not listed in {MANIFEST_NAME}")
        return self._listed[name]

    def read(self, name: str) -> bytes:
        """Content of a listed file."""
        with self.stream(name) as file:
            try:
                return file.read()
            except (MemoryError, OverflowError):
                raise self._damaged(name, f"{self.listed(name).size_bytes} bytes do not fit into memory") from None

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Reads a listed file into a buffer of the same size."""
        with self.stream(name) as file:
            file.readinto(buffer)

    @contextmanager
    def stream(self, name: str) -> Iterator[CheckedFile]:
        """A listed file, which the block must read to its end; the end of the block compares it with the manifest."""
        entry = self.listed(name)
        with self._opened(entry) as file:
            checked = CheckedFile(file, entry, self._checksums, lambda why: self._damaged(name, why))
            yield checked
            checked.finish()
        self._hashed.add(name)

    def copy(self, names: Iterable[str], folder: Path) -> None:
        """Copies listed files to their paths below `folder`."""
        for name in names:
            self.copy_file(name, folder / name)

    def copy_file(self, name: str, target: Path) -> None:
        """Copies one listed file to a new plain file; also raises `OSError` if that can't be written."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as copied, self.stream(name) as file:
            while content := file.read(1 << 20):
                copied.write(content)

    def copy_all(self, folder: Path) -> None:
        """Copies the artifact: the listed files, the manifest and the signature."""
        self.copy(self._listed, folder)
        self.copy_proof(folder)

    def copy_proof(self, folder: Path) -> None:
        """Copies the manifest and the signature."""
        (folder / MANIFEST_NAME).write_bytes(self.manifest_bytes)
        if self.signature is not None:
            (folder / SIGNATURE_NAME).write_bytes(self.signature)

    def listing(self, name: str) -> FileEntry | None:
        """A new entry for a file that the manifest does not list yet; None: no such file."""
        with self._explained(name):
            try:
                with self._folder.open(name) as file:
                    return file_entry(name, file)
            except FileNotFoundError:
                return None

    def replace_manifest(self, manifest: Manifest) -> None:
        """Writes another manifest, which the signature no longer fits; raises `OutputError` if it can't be written."""
        self._replace(MANIFEST_NAME, manifest.to_bytes())

    def close(self) -> None:
        """Closes the folder."""
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _again(self) -> str:
        return f"Export again: {self.manifest.command}"

    def _damaged(self, name: str, why: str) -> DamagedArtifact:
        return DamagedArtifact(f"{self.path / name}: {why}. {self._again}")

    def _replace(self, name: str, content: bytes) -> None:
        try:
            self._folder.replace(name, content, part=name + _PART_SUFFIX)
        except OSError as error:
            raise OutputError(
                f"{self.path / name}: can't be written ({error.strerror}). Use a copy of your own: "
                f"cp -rL {self.path} DIR && ettin-verify DIR"
            ) from None

    @contextmanager
    def _opened(self, entry: FileEntry) -> Iterator[BinaryIO]:
        """The file, whose size is that in the manifest."""
        with self._explained(entry.path):
            file = self._folder.open(entry.path)
        with file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != entry.size_bytes:
                raise self._damaged(entry.path, f"{size_bytes} bytes, {MANIFEST_NAME} says {entry.size_bytes}")
            yield file

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._damaged(name, f"missing, but listed in {MANIFEST_NAME}") from None
        except OSError as error:
            why = "a link" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
            raise self._damaged(name, f"can't be read ({why})") from None

    def _refuse_unlisted(self) -> None:
        expected = {*self._listed, MANIFEST_NAME, SIGNATURE_NAME, *_left_by_the_builder(self.manifest)}
        folders = {str(parent) for name in self._listed for parent in PurePosixPath(name).parents} - {"."}
        pending = [""]
        while pending:
            with self._explained(pending[-1]):
                for name, kind in self._folder.entries(pending.pop()):
                    if kind == "folder" and (name in folders or name == ".cache"):
                        pending.append(name)
                    elif not _is_expected(name, kind, expected):
                        raise DamagedArtifact(
                            f"{self.path / name}: {_KINDS[kind]} that is not listed in {MANIFEST_NAME}; an artifact "
                            "holds nothing else. Remove it, or keep it elsewhere"
                        )


def _is_expected(name: str, kind: Kind, expected: set[str]) -> bool:
    # A listed name that is a link was judged when it was opened; what is ignored is never opened.
    is_listed = name in expected and kind in ("file", "link")
    return is_listed or name in _IGNORED or (kind == "folder" and name in _IGNORED_FOLDERS)


def _left_by_the_builder(manifest: Manifest) -> tuple[str, ...]:
    """What `trtexec` writes beside the engine of a build kit."""
    if manifest.engine is None:
        return ()
    return manifest.entry, f"{manifest.entry}.part", str(PurePosixPath(manifest.entry).with_name("timing.cache"))
