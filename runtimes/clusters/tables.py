"""Scores of the pairs in Arrow tables."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ettin.artifacts.errors import InputError
from ettin.runtimes.clusters.workers import process_runtime


class TableScorer:
    """Adds a column of scores to Arrow tables.

    It pickles to its arguments, and uses the runtime of the process that calls it (see `process_runtime`).

    Args:
        artifact: see `load`.
        query: name of the column of queries.
        document: name of the column of documents.
        score: name of the new column: what `predict` returns, float32; null where the query or the document is null.
        settings: other arguments of `load`.
    """

    def __init__(
        self, artifact: str, query: str = "query", document: str = "document", score: str = "score", **settings: Any
    ) -> None:
        # A worker may run in another folder, where a relative path would be taken for a hub id.
        self.artifact = str(Path(artifact).absolute()) if os.path.lexists(artifact) else artifact
        self.settings = settings
        self.query, self.document, self.score = query, document, score

    def with_settings(self, **settings: Any) -> "TableScorer":
        """The same with other arguments of `load`."""
        return TableScorer(self.artifact, self.query, self.document, self.score, **{**self.settings, **settings})

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with its scores; also raises `InputError`, see `schema`."""
        schema = self.schema(table.schema)
        pairs = list(zip(*(table.column(name).to_pylist() for name in (self.query, self.document)), strict=True))
        is_whole = np.array([None not in pair for pair in pairs], bool)
        scores = np.zeros(len(pairs), np.float32)
        scores[is_whole] = process_runtime(self.artifact, **self.settings).predict(
            [pair for pair in pairs if None not in pair]
        )
        return pa.table([*table.columns, pa.array(scores, mask=~is_whole)], schema=schema)

    def schema(self, given: pa.Schema) -> pa.Schema:
        """The schema of a table with scores.

        Raises:
            InputError: a column is missing or does not hold strings, or the table has a column of scores already.
        """
        for name in (self.query, self.document):
            if given.names.count(name) != 1:
                found = ", ".join(given.names)[:200]
                raise InputError(f"expected one column '{name}', found: {found}. Name the columns of the pairs")
            kind = given.field(name).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise InputError(f"column '{name}' has the type {kind}, expected string")
        if self.score in given.names:
            raise InputError(f"a column '{self.score}' is already there. Choose another name for the scores")
        return given.append(pa.field(self.score, pa.float32()))
