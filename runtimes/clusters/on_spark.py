"""Scoring of Spark data frames."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.types import FloatType, StructField, StructType

from ettin.runtimes.clusters.tables import TableScorer


def score_frame(
    frame: DataFrame,
    artifact: str,
    query: str = "query",
    document: str = "document",
    score: str = "score",
    **settings: Any,
) -> DataFrame:
    """A data frame with a column of scores; Spark computes it when it is used.

    Each Python worker of Spark loads the artifact once and uses as many threads as `spark.task.cpus` says.

    Args:
        frame: the pairs.
        artifact: see `load`; every executor finds it at the same path.
        query: see `TableScorer`.
        document: see `TableScorer`.
        score: see `TableScorer`.
        settings: other arguments of `load`.
    """
    scorer = TableScorer(artifact, query, document, score, **settings)

    def scored(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from scorer(pa.Table.from_batches([batch])).to_batches()

    return frame.mapInArrow(scored, StructType([*frame.schema.fields, StructField(score, FloatType())]))
