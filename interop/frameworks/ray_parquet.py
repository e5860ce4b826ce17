# /// script
# dependencies = ["psutil", "pyarrow", "ray[data]>=2.40"]
# ///
"""Ray Data over an artifact, with an actor that is killed: prints the scores of 64 parity pairs as JSON."""

import json
import os
import sys
import tempfile
import threading
import time
from importlib.metadata import version
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
cases = [json.loads(line) for line in (Path(artifact) / "parity.jsonl").read_text("utf-8").split("\n")[:64]]
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
        rows = [{"id": number, **cases[number]} for number in range(file * 4, file * 4 + 4)] * 50
        pq.write_table(pa.Table.from_pylist(rows), source / f"{file:02d}.parquet")
    killer = threading.Thread(target=kill_an_actor, args=(target,), daemon=True)
    killer.start()
    outcomes = score_parquet(artifact, str(source), str(target), actors=2)
    killer.join(60)
    table = pa.concat_tables(pq.read_table(path) for path in sorted(target.iterdir()))
    assert killed and len(outcomes) == 16 and table.num_rows == 64 * 50, (killed, len(outcomes), table.num_rows)
    assert score_parquet(artifact, str(source), str(target)) == [], "files that were there were scored again"


class Share:
    """What a runtime with default settings makes of an actor's share."""

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        runtime = process_runtime(artifact)
        return {"streams": runtime.limits.concurrency}


one = {"compute": ray.data.ActorPoolStrategy(size=1)}
shares = [ray.data.range(1).map(Share, num_cpus=cores, **one).take_all()[0]["streams"] for cores in (1, 2)]
assert shares == [1, min(2, len(os.sched_getaffinity(0)))], f"streams of actors of 1 and 2 cores: {shares}"
pairs = ray.data.from_arrow(table.select(["id", "query", "document"]))
again = pairs.map_batches(TableScorer, fn_constructor_args=[artifact], batch_format="pyarrow", **one).to_pandas()
scores = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
assert max(abs(scores[row.id] - row.score) for row in again.itertuples()) < 0.1
print(json.dumps({"system": "Ray Data", "version": version("ray"), "scores": [scores[number] for number in range(64)]}))
