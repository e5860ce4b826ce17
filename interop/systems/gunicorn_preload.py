# system: Gunicorn
# artifact: openvino fp32
# requires: gunicorn==27.0.1 ettin-export[openvino]
# largest error: 1e-4
"""Gunicorn with --preload and two workers over an artifact: prints the scores of the question's documents as JSON.

The application loads the artifact before Gunicorn forks, which must be an error and no hang, and again after it.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ettin.runtimes.clusters.workers import process_runtime

ARTIFACT = os.environ.get("GUNICORN_EXAMPLE", "")
PARENTS = process_runtime(ARTIFACT) if ARTIFACT else None  # in Gunicorn: before the fork
if PARENTS:
    PARENTS.predict(("a", "b"))


def app(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    pairs = json.load(environment["wsgi.input"])
    runtime = PARENTS if environment["PATH_INFO"] == "/parents" else process_runtime(ARTIFACT)
    try:
        content: Any = {"worker": os.getpid(), "scores": [float(score) for score in runtime.predict(pairs)]}
    except Exception as error:
        content = {"error": str(error)}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(content).encode()]


def main() -> None:
    artifact = Path(sys.argv[1]).resolve()
    question = json.load(sys.stdin)
    pairs = [[question["query"], text] for text in question["documents"]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    command = ["--preload", "--workers", "2", "--bind", address, "--timeout", "60", f"{Path(__file__).stem}:app"]
    with subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *command],
        env=os.environ | {"GUNICORN_EXAMPLE": str(artifact)},
        cwd=Path(__file__).parent,
    ) as server:

        def answer(path: str, body: Any) -> Any:
            request = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode())
            for _ in range(120):
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                        return json.load(response)
                except urllib.error.URLError as error:
                    if not isinstance(error.reason, ConnectionRefusedError):
                        raise
                    time.sleep(0.5)
            raise TimeoutError(address)

        try:
            answers = [answer("/", [pair]) for pair in pairs]
            refused = answer("/parents", pairs[:1])
        finally:
            server.terminate()
    assert "engines do not survive a fork" in refused["error"], refused
    scores = [score for part in answers for score in part["scores"]]
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
