"""Scoring of Spark data frames."""

from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.types import FloatType, StructField, StructType

from ettin.runtimes.clusters.tables import TableScorer


def score_frame(frame: DataFrame, scorer: TableScorer) -> DataFrame:
    """A data frame with a column of scores; Spark computes it when it is used.

    Each Python worker of Spark loads the artifact once, which it finds at the same path on every executor. It uses as
    many threads as `spark.task.cpus` says.
    """

    def scored(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from scorer(pa.Table.from_batches([batch])).to_batches()

    return frame.mapInArrow(scored, StructType([*frame.schema.fields, StructField(scorer.score, FloatType())]))
