"""Simulates a hybrid processor: two cores, of which one has half of its time. Prints the speed of two policies.

    python parity_tests/tools/slow_core.py ARTIFACT SET

SET is a folder in BEIR form. A busy neighbour takes half of core 1. "fast" uses core 0 alone, "all" has a stream on
each.
"""

import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from ettin.bench.workloads import read_beir
from ettin.runtimes import Runtime, load
from ettin.runtimes.engines.on_openvino import OpenVinoRuntime

ROUNDS = 9


def measured(artifact: Path, pairs: list[tuple[str, str]], cores: set[int]) -> None:
    """A child process: scores `pairs` whenever a line comes in, and prints the seconds."""
    os.sched_setaffinity(0, cores)
    read_model = OpenVinoRuntime._read_model

    def pinned(runtime: OpenVinoRuntime, *arguments: object) -> object:
        runtime._options["ENABLE_CPU_PINNING"] = True  # or a thread leaves the slow core
        return read_model(runtime, *arguments)  # type: ignore[arg-type]

    OpenVinoRuntime._read_model = pinned  # type: ignore[method-assign,assignment]
    runtime: Runtime = load(artifact, max_length=512)
    assert runtime.limits.concurrency == len(cores)
    runtime.predict(pairs)
    for _ in sys.stdin:
        start_s = time.perf_counter()
        runtime.predict(pairs)
        click.echo(time.perf_counter() - start_s)


def compared(artifact: str, folder: str, kind: str) -> None:
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, artifact, folder, kind, cores],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name, cores in (("fast", "0"), ("all", "0,1"))
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(ROUNDS):
        for name, child in children.items():
            assert child.stdin and child.stdout
            child.stdin.write("\n")
            child.stdin.flush()
            seconds[name].append(float(child.stdout.readline()))
    ratios = [fast_s / all_s for fast_s, all_s in zip(*seconds.values(), strict=True)]
    click.echo(f"{kind}: all cores {statistics.median(ratios):.2f} times the speed of the fast core alone")
    for child in children.values():
        child.terminate()


def main(artifact: str, folder: str, kind: str = "", cores: str = "") -> None:
    if kind:
        data, rng = read_beir(Path(folder), "test"), random.Random(1)
        queries, documents = list(data.queries.values()), list(data.documents.values())
        count, one = (300, None) if kind == "stream" else (100, queries[0])
        pairs = [(one or rng.choice(queries), rng.choice(documents)) for _ in range(count)]
        return measured(Path(artifact), pairs, set(map(int, cores.split(","))))
    busy = "import os\nos.sched_setaffinity(0, {1})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as neighbour:
        for workload in ("stream", "100 candidates"):
            compared(artifact, folder, workload)
        neighbour.kill()
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
