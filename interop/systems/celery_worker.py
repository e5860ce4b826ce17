# system: Celery
# artifact: openvino fp32
# requires: celery==5.7.0 ettin-export[openvino]
# largest error: 1e-4
"""A Celery worker with two forked processes over an artifact: prints the scores of the question's documents as JSON.

The module loads the artifact before Celery forks, which must be an error and no hang, and again after it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from celery import Celery

from ettin.runtimes.clusters.workers import process_runtime

FOLDER, ARTIFACT = os.environ.get("CELERY_EXAMPLE", "|").split("|")

app = Celery(Path(__file__).stem, broker="filesystem://", backend=f"file://{FOLDER}")
app.conf.broker_transport_options = {"data_folder_in": FOLDER, "data_folder_out": FOLDER, "control_folder": FOLDER}
PARENTS = process_runtime(ARTIFACT) if ARTIFACT else None  # in the worker: before the fork
if PARENTS:
    PARENTS.predict(("a", "b"))


@app.task(name="score")
def score(pairs: list[list[str]]) -> list[float]:
    return [float(value) for value in process_runtime(ARTIFACT).predict(pairs)]


@app.task(name="score_with_the_parents")
def score_with_the_parents() -> str:
    try:
        return str(PARENTS.predict(("a", "b")))
    except Exception as error:
        return str(error)


def main() -> None:
    artifact = Path(sys.argv[1]).resolve()
    question = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"CELERY_EXAMPLE": f"{folder}|{artifact}"}
        worker = ["-A", Path(__file__).stem, "worker", "--concurrency", "2", "--pool", "prefork", "--loglevel", "ERROR"]
        with subprocess.Popen(
            [sys.executable, "-m", "celery", *worker], env=environment, cwd=Path(__file__).parent, stdout=sys.stderr
        ) as process:
            try:
                client = Celery(Path(__file__).stem, broker="filesystem://", backend=f"file://{folder}")
                client.conf.broker_transport_options = dict.fromkeys(
                    ("data_folder_in", "data_folder_out", "control_folder"), folder
                )
                tasks = [client.send_task("score", [[[question["query"], text]]]) for text in question["documents"]]
                scores = [value for task in tasks for value in task.get(timeout=120)]
                refused = client.send_task("score_with_the_parents").get(timeout=60)
            finally:
                process.terminate()
    assert "engines do not survive a fork" in refused, refused
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
