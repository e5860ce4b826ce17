"""Scoring of Parquet files, one at a time and each in one step, so that a run that was killed goes on.

A file of scores appears whole or not at all, and says of itself what it was made from. So a run leaves out the files
that are there, and a file that two workers score, because one of them seemed lost, is there once.
"""

import json
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from ettin.artifacts.errors import ArtifactError, EttinError, InputError, OutputError
from ettin.artifacts.writing import replace
from ettin.runtimes.clusters.tables import TableScorer
from ettin.runtimes.clusters.workers import process_runtime

_MARK = b"ettin.scored"  # a key of the metadata of a file of scores
_ROWS = 4096  # scored together, and a row group of the output
_PART = re.compile(r"\..*\.partial-[0-9a-f]{8}")
_HIDDEN = re.compile(r"/[._]")
_READERS = 16  # of footers, at the same time


@dataclass(frozen=True)
class Part:
    """A file to score."""

    source: str  # path of the file in the input's file system
    target: str  # path of the file of scores in the output's
    pairs: int
    size_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of a part: rows without a score, the first of them, or why there are no scores."""

    source: str
    pairs: int
    null_rows: int = 0
    first_null_row: int | None = None
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.source}: not scored: {self.error}"
        return (
            f"{self.source}: {self.null_rows} rows lack a text, the first is row {self.first_null_row}; no scores there"
        )


class ParquetJob:
    """Scores all Parquet files of a folder. Pickles; any system may call `score` with the parts, in any process.

    Args:
        scorer: what adds the scores.
        digest: digest of the artifact's manifest; the scores of another are never added to.
        source: a file, or a folder that is searched for `*.parquet` at any depth. A path, or an address that pyarrow
            knows, such as `s3://bucket/folder`.
        target: folder for the scores, which get the names of their sources. One run at a time may write it.
    """

    def __init__(self, scorer: TableScorer, digest: str, source: str, target: str) -> None:
        self.scorer, self.digest, self.source, self.target = scorer, digest, source, target

    def parts(self) -> tuple[list[Part], int]:
        """The files without scores, and the number of pairs in the others. Removes what killed workers left.

        Raises:
            InputError: no such files, or one that can't be scored.
            OutputError: the output is a part of the input, or holds something else than scores of these files.
        """
        (files, source), (target_files, target) = _opened(self.source), _opened(self.target)
        infos = _parquet_files(files, source)
        if not infos:
            raise InputError(f"{self.source}: no Parquet files. Expected a file or a folder with *.parquet")
        is_file = infos[0].path == source
        above = source.rpartition("/")[0] if is_file else source
        if target == above or (not is_file and target.startswith(f"{above}/")):
            raise OutputError(f"{self.target}: the input {self.source} is there. Choose a folder elsewhere")
        for info in target_files.get_file_info(FileSelector(target, allow_not_found=True, recursive=True)):
            if _PART.fullmatch(info.base_name):
                target_files.delete_file(info.path)

        def examined(info: FileInfo) -> tuple[Part, bool]:
            part = Part(info.path, target + info.path.removeprefix(above), self._pairs(files, info.path), info.size)
            return part, self._is_done(target_files, part)

        with ThreadPoolExecutor(_READERS) as pool:
            examined_parts = list(pool.map(examined, infos))
        done_pairs = sum(part.pairs for part, is_done in examined_parts if is_done)
        return [part for part, is_done in examined_parts if not is_done], done_pairs

    def score(self, part: Part) -> Outcome:
        """Writes the scores of one file."""
        try:
            null_rows = self._write(part)
        except (EttinError, OSError, pa.ArrowException, UnicodeDecodeError) as error:
            return Outcome(part.source, part.pairs, error=_first_line(error))
        return Outcome(part.source, part.pairs, len(null_rows), next(iter(null_rows), None))

    def _write(self, part: Part) -> list[int]:
        scorer = self.scorer
        if process_runtime(scorer.artifact, **scorer.settings).manifest.digest != self.digest:
            raise ArtifactError(f"{scorer.artifact}: another artifact than the one that this run began with")
        target_files, _ = _opened(self.target)
        folder, _, name = part.target.rpartition("/")
        unfinished = f"{folder}/.{name}.partial-{secrets.token_hex(4)}"
        target_files.create_dir(folder, recursive=True)
        try:
            null_rows = self._write_to(target_files, unfinished, part)
            if isinstance(target_files, LocalFileSystem):
                replace(Path(unfinished), Path(part.target))
            else:
                target_files.move(unfinished, part.target)
        except Exception:
            with suppress(OSError):
                target_files.delete_file(unfinished)
            raise
        return null_rows

    def _write_to(self, target_files: FileSystem, unfinished: str, part: Part) -> list[int]:
        """Scores a file into another; returns the rows without a score."""
        files, _ = _opened(self.source)
        null_rows: list[int] = []
        with files.open_input_file(part.source) as source, target_files.open_output_stream(unfinished) as target:
            file = pq.ParquetFile(source)
            schema = self.scorer.schema(file.schema_arrow)
            schema = schema.with_metadata({**(schema.metadata or {}), _MARK: self._mark(part)})
            with pq.ParquetWriter(target, schema) as writer:
                row = 0
                for batch in file.iter_batches(_ROWS):
                    table = self.scorer(pa.Table.from_batches([batch]))
                    scores = table.column(self.scorer.score)
                    null_rows += [row + index for index, score in enumerate(scores.is_null().to_pylist()) if score]
                    writer.write_table(table.cast(schema))
                    row += len(table)
        return null_rows

    def _pairs(self, files: FileSystem, path: str) -> int:
        try:
            with files.open_input_file(path) as file:
                footer = pq.ParquetFile(file)
                self.scorer.schema(footer.schema_arrow)
                return int(footer.metadata.num_rows)
        except (EttinError, OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: {_first_line(error)}") from None

    def _is_done(self, files: FileSystem, part: Part) -> bool:
        if files.get_file_info(part.target).type == FileType.NotFound:
            return False
        with suppress(OSError, pa.ArrowException), files.open_input_file(part.target) as file:
            footer = pq.read_metadata(file)
            if footer.num_rows == part.pairs and (footer.metadata or {}).get(_MARK) == self._mark(part):
                return True
        raise OutputError(
            f"{part.target}: not the scores of {part.source} by this artifact and these settings. Remove it, or choose "
            "another output"
        )

    def _mark(self, part: Part) -> bytes:
        """What a file of scores was made from."""
        scorer = self.scorer
        columns = [scorer.query, scorer.document, scorer.score]
        fields = [self.digest, scorer.settings.get("max_length"), columns, part.size_bytes]
        return json.dumps(fields).encode()


def _opened(place: str) -> tuple[FileSystem, str]:
    """The file system of a path or an address, and the path there."""
    try:
        files, path = FileSystem.from_uri(place if "://" in place else os.path.realpath(place))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{place}: no such place ({error}). Expected a path, or an address such as s3://…") from None
    return files, path.rstrip("/")


def _parquet_files(files: FileSystem, path: str) -> list[FileInfo]:
    """The file, or the Parquet files below the folder; those below names with "." or "_" in front are no data."""
    info = files.get_file_info(path)
    if info.type == FileType.File:
        return [info]
    infos = files.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
    data = [info for info in infos if info.extension == "parquet" and not _HIDDEN.search(info.path.removeprefix(path))]
    return sorted(data, key=lambda info: info.path)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
