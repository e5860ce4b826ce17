"""Scores many pairs with `ettin-score`, kills an actor and the run, and proves that no row is lost or doubled.

    python parity_tests/tools/campaign_batch.py ARTIFACT --pairs 1000000 --kill --json bench/results/NAME.json

It needs the extras `bench` and `ray`. Without `--kill` it measures pairs per second, with `--actors` several times.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from ettin.bench.machine import about, write_result
from ettin.runtimes import Runtime, load

COMMAND = "from ettin.runtimes.commands.score import main; main()"
_COLUMNS = ["id", "query", "document"]


def write_pairs(folder: Path, artifact: Path, pairs: int, file_pairs: int) -> None:
    """Short pairs, every one unlike all others, made from the natural ones of the artifact."""
    lines = (artifact / "parity.jsonl").read_text("utf-8").split("\n")
    cases = [case for case in map(json.loads, filter(None, lines)) if 20 < len(case["query"]) < 100]
    folder.mkdir()
    for start in range(0, pairs, file_pairs):
        ids = range(start, min(start + file_pairs, pairs))
        queries = [cases[number * 31 % len(cases)]["query"] for number in ids]
        documents = [f"{cases[number * 17 % len(cases)]['document'][:120]} {number}" for number in ids]
        table = pa.table({"id": list(ids), "query": queries, "document": documents})
        pq.write_table(table, folder / f"part-{start // file_pairs:06d}.parquet")


def started(artifact: Path, folder: Path, actors: int) -> subprocess.Popen[bytes]:
    arguments = [str(artifact), str(folder / "pairs"), str(folder / "scored"), "--actors", str(actors)]
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], start_new_session=True)


def wait(run: subprocess.Popen[bytes], scored: Path, files: int) -> None:
    while run.poll() is None and len(list(scored.glob("part-*.parquet"))) < files:
        time.sleep(0.2)


def kill_an_actor(run: subprocess.Popen[bytes]) -> int:
    """Kills one that is scoring; Ray's processes are children of the run."""
    actors = [child for child in psutil.Process(run.pid).children(recursive=True) if "_Actor" in child.name()]
    actors = actors or [
        child for child in psutil.Process(run.pid).children(recursive=True) if "_Actor" in "".join(child.cmdline())
    ]
    actors[0].kill()
    return len(actors)


def digest(table: pa.Table) -> str:
    return hashlib.sha256("\n".join(map(str, zip(*table.to_pydict().values(), strict=True))).encode()).hexdigest()


def proof(folder: Path, runtime: Runtime) -> dict[str, Any]:
    """Compares input and output, file by file and row by row; rescores a sample."""
    sources, scored = (sorted((folder / name).iterdir()) for name in ("pairs", "scored"))
    assert [path.name for path in sources] == [path.name for path in scored], "other files than those of the input"
    whole, ids, error = hashlib.sha256(), 0, 0.0
    for index, (source, target) in enumerate(zip(sources, scored, strict=True)):
        given, table = pq.read_table(source), pq.read_table(target)
        sums = digest(given), digest(table.select(_COLUMNS))
        assert sums[0] == sums[1], f"{target}: other rows than those of the input"
        assert table.column("score").null_count == 0, f"{target}: rows without scores"
        whole.update(sums[1].encode())
        ids += table.num_rows
        if index % max(1, len(sources) // 20) == 0:
            sample = table.slice(0, 100).to_pydict()
            again = runtime.predict(list(zip(sample["query"], sample["document"], strict=True)))
            error = max(error, float(np.abs(again - np.array(sample["score"], np.float32)).max()))
    return {"rows": ids, "files": len(scored), "sha256_of_rows": whole.hexdigest(), "sample_max_difference": error}


def measured(folder: Path, artifact: Path, actors: int, kill: bool, file_pairs: int) -> dict[str, Any]:
    """One run, whose output is `folder / "scored"`."""
    scored, files = folder / "scored", len(list((folder / "pairs").iterdir()))
    start = time.time()
    run = started(artifact, folder, actors)
    result: dict[str, Any] = {"actors": actors}
    if kill:
        wait(run, scored, files // 4)
        result["actors_alive_when_one_was_killed"] = kill_an_actor(run)
        wait(run, scored, files // 2)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        result["files_when_the_run_was_killed"] = len(list(scored.glob("part-*.parquet")))
        time.sleep(5)  # what Ray started ends by itself
        run = started(artifact, folder, actors)
    assert run.wait() == 0, "ettin-score failed"
    result["wall_s"] = round(time.time() - start, 1)
    ends = sorted(path.stat().st_mtime for path in scored.iterdir())
    if not kill and len(ends) > 2 * actors:  # from the first files of all actors to the last file
        files_per_s = (len(ends) - actors) / (ends[-1] - ends[actors - 1])
        result["pairs_per_s"] = round(files_per_s * file_pairs, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--file-pairs", type=int, default=5000)
    parser.add_argument("--actors", type=int, nargs="+", default=[2])
    parser.add_argument("--kill", action="store_true", help="kill an actor, then the run, and run again")
    parser.add_argument("--folder", type=Path, help="where pairs and scores are kept; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    artifact = options.artifact.resolve()
    runs = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name, load(artifact, threads=1) as runtime:
        folder = Path(name)
        write_pairs(folder / "pairs", artifact, options.pairs, options.file_pairs)
        first = pq.read_table(sorted((folder / "pairs").iterdir())[0]).to_pydict()
        texts = list(zip(first["query"], first["document"], strict=True))[:1000]
        tokens = float(np.mean([len(ids) for ids in runtime.tokenizer.pairs(texts, runtime.max_length)]))
        for actors in options.actors:
            result = measured(folder, artifact, actors, options.kill, options.file_pairs)
            runs.append({**result, **proof(folder, runtime)})
            (folder / "scored").rename(folder / f"scored-{actors}-{len(runs)}")
        result = {
            **about(runtime),
            "pairs": options.pairs,
            "mean_tokens": round(tokens, 1),
            "pairs_in_a_file": options.file_pairs,
            "threads_of_an_actor": 1,
            "ray": version("ray"),
            "pyarrow": version("pyarrow"),
            "runs": runs,
        }
    print(json.dumps(result, indent=1))  # noqa: T201
    write_result(
        options.json, "batch", result, shlex.join(["python", "parity_tests/tools/campaign_batch.py", *sys.argv[1:]])
    )


if __name__ == "__main__":
    main()
