# /// script
# dependencies = ["pyspark>=3.5", "pyarrow", "pandas"]
# ///
"""A Spark data frame over an artifact: prints the scores of its first 64 parity pairs as JSON. Needs Java."""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from pyspark.sql import SparkSession

from ettin.runtimes.clusters.on_spark import score_frame

artifact = Path(sys.argv[1]).resolve()
cases = [json.loads(line) for line in (artifact / "parity.jsonl").read_text("utf-8").split("\n")[:64]]
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ.pop("OMP_NUM_THREADS", None)  # so that Spark says how many cores a worker has
spark = (
    SparkSession.builder.master("local[2]")
    .config("spark.ui.enabled", "false")
    .config("spark.sql.execution.arrow.maxRecordsPerBatch", "8")
    .getOrCreate()
)
spark.sparkContext.setLogLevel("ERROR")
rows = [(number, case["query"], case["document"]) for number, case in enumerate([*cases, {**cases[0], "query": None}])]
frame = spark.createDataFrame(rows, "id long, query string, document string").repartition(4)
scored = {row.id: row.score for row in score_frame(frame, str(artifact)).collect()}
assert sorted(scored) == list(range(65)) and scored[64] is None
share = spark.sparkContext.parallelize([0], 1).map(lambda _: os.environ.get("OMP_NUM_THREADS")).collect()
spark.stop()
assert share == ["1"], f"a worker of one core was told {share}"
scores = [scored[number] for number in range(64)]
print(json.dumps({"system": "Spark", "version": version("pyspark"), "scores": scores}))
