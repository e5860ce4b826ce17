# system: Spark
# artifact: openvino fp32
# requires: pyspark==4.3.0 pandas==3.1.1 pyarrow==26.0.1 ettin-export[openvino,spark]
# largest error: 1e-4
"""A Spark data frame over an artifact: prints the scores of the question's documents as JSON. Needs Java."""

import json
import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

from ettin.runtimes.clusters.on_spark import score_frame
from ettin.runtimes.clusters.tables import TableScorer

artifact = Path(sys.argv[1]).resolve()
question = json.load(sys.stdin)
texts = [*question["documents"], None]
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ.pop("OMP_NUM_THREADS", None)  # so that Spark says how many cores a worker has
spark = (
    SparkSession.builder.master("local[2]")
    .config("spark.ui.enabled", "false")
    .config("spark.sql.execution.arrow.maxRecordsPerBatch", "8")
    .getOrCreate()
)
spark.sparkContext.setLogLevel("ERROR")
rows = [(number, question["query"], text) for number, text in enumerate(texts)]
frame = spark.createDataFrame(rows, "id long, query string, document string").repartition(4)
scored = {row.id: row.score for row in score_frame(frame, TableScorer(str(artifact))).collect()}
assert sorted(scored) == list(range(len(texts))) and scored.pop(len(texts) - 1) is None
share = spark.sparkContext.parallelize([0], 1).map(lambda _: os.environ.get("OMP_NUM_THREADS")).collect()
spark.stop()
assert share == ["1"], f"a worker of one core was told {share}"
print(json.dumps([scored[number] for number in sorted(scored)]))
