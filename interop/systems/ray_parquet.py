# system: Ray Data
# artifact: openvino fp32
# requires: ray[data]==2.60.0 psutil==7.2.2 pyarrow==26.0.1 ettin-export[openvino,ray]
# largest error: 1e-4
"""Ray Data over an artifact, with an actor that is killed: prints the scores of the question's documents as JSON."""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from ettin.runtimes.clusters.on_ray import score_parquet
from ettin.runtimes.clusters.tables import TableScorer
from ettin.runtimes.clusters.workers import process_runtime

artifact = str(Path(sys.argv[1]).resolve())
question = json.load(sys.stdin)
texts = question["documents"]
os.environ.pop("OMP_NUM_THREADS", None)  # so that Ray says how many cores an actor has
ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")


def kill_an_actor(scored: Path) -> None:
    while len(list(scored.glob("*.parquet"))) < 4:
        time.sleep(0.05)
    actors = [child for child in psutil.Process().children(recursive=True) if "_Actor" in "".join(child.cmdline())]
    actors[0].kill()
    killed.append(actors[0].pid)


killed: list[int] = []
with tempfile.TemporaryDirectory() as name:
    source, target = Path(name, "pairs"), Path(name, "scored")
    source.mkdir()
    for file in range(16):
        rows = [{"id": number, "query": question["query"], "document": text} for number, text in enumerate(texts)] * 40
        pq.write_table(pa.Table.from_pylist(rows), source / f"{file:02d}.parquet")
    killer = threading.Thread(target=kill_an_actor, args=(target,), daemon=True)
    killer.start()
    outcomes = score_parquet(TableScorer(artifact), str(source), str(target), actors=2)
    killer.join(60)
    table = pa.concat_tables(pq.read_table(path) for path in sorted(target.iterdir()))
    assert killed and len(outcomes) == 16 and table.num_rows == 16 * 40 * len(texts), (
        killed,
        len(outcomes),
        table.num_rows,
    )
    assert score_parquet(TableScorer(artifact), str(source), str(target)) == [], (
        "files that were there were scored again"
    )


class Share:
    """What a runtime with default settings makes of an actor's share."""

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        runtime = process_runtime(artifact)
        return {"streams": runtime.limits.concurrency}


one = {"compute": ray.data.ActorPoolStrategy(size=1)}
shares = [
    ray.data.from_items([{"id": 0}]).map(Share, num_cpus=cores, **one).take_all()[0]["streams"] for cores in (1, 2)
]
assert shares == [1, min(2, len(os.sched_getaffinity(0)))], f"streams of actors of 1 and 2 cores: {shares}"
pairs = ray.data.from_arrow(table.select(["id", "query", "document"]))
again = pairs.map_batches(TableScorer, fn_constructor_args=[artifact], batch_format="pyarrow", **one).to_pandas()
scores = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
assert max(abs(scores[row.id] - row.score) for row in again.itertuples()) < 0.1
ray.shutdown()  # it prints, too
print(json.dumps([scores[number] for number in range(len(texts))]))
