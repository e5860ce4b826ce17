"""Random damage to an artifact, in a process of its own: `make test` runs it small, a soak run large.

    python campaign_damage.py ARTIFACT SCRATCH --seed 7 --mutations 60

A mutated artifact must load with the same scores or end in one `EttinError`. The last line on stdout is JSON: mutations
of files, mutations of fields whose manifest was sealed again, artifacts that still loaded, and the longest time in
seconds that one took. A hang ends the process by SIGALRM.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from support import rewrite

from ettin.artifacts.errors import EttinError
from ettin.runtimes import load

HANG_S = 60
PAIRS = [("red planet", "Mars is the red planet."), ("a", "b " * 40)]
VALUES: list[Any] = [
    None, -1, 0, 1, 10**30, 1.5, "", "x", "../x", "\x1b[2J", [], {}, ["a"], True, "x" * 10000,
]  # fmt: skip


def mutate_file(folder: Path, dice: random.Random) -> str:
    """Changes bytes of one file; its name."""
    path = dice.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 8])):
        kind, place = dice.choice(["flip", "cut", "insert"]), dice.randrange(len(content) or 1)
        if kind == "flip" and content:
            content[place] ^= 1 << dice.randrange(8)
        elif kind == "cut":
            del content[place : place + dice.choice([1, 100, 10**9])]
        else:
            content[place:place] = dice.randbytes(dice.choice([1, 50]))
    path.write_bytes(content)
    return path.relative_to(folder).as_posix()


def mutate_field(folder: Path, dice: random.Random) -> None:
    """Changes one value of the manifest and seals it again."""

    def change(content: Any) -> None:
        node = content
        while True:
            key = dice.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], (dict, list)) and node[key] and dice.random() < 0.8:
                node = node[key]
                continue
            node[key] = dice.choice(VALUES)
            return

    rewrite(folder, change)


def run(original: Path, scratch: Path, seed: int, mutations: int) -> dict[str, Any]:
    """All mutations of one artifact."""
    dice, counts, longest_s = random.Random(seed), Counter[str](), 0.0
    with load(original, threads=1) as runtime:
        expected = runtime.predict(PAIRS)
    for _ in range(mutations):
        folder = scratch / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        what = "a sealed field"
        if dice.random() < 0.5:
            mutate_field(folder, dice)
            counts["sealed"] += 1
        else:
            what = mutate_file(folder, dice)
            counts["unsealed"] += 1
        signal.alarm(HANG_S)
        started = time.monotonic()
        try:
            with load(folder, threads=1, allow_unverified=True) as runtime:
                if runtime.manifest.activation == "identity":
                    assert np.array_equal(runtime.predict(PAIRS), expected), what
                counts["loaded"] += 1
        except EttinError as error:
            assert str(error).isprintable(), error
            counts["refused"] += 1
        longest_s = max(longest_s, time.monotonic() - started)
        signal.alarm(0)
    return {**counts, "longest_s": round(longest_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--mutations", type=int, default=60)
    given = parser.parse_args()
    sys.stdout.write(json.dumps(run(given.artifact, given.scratch, given.seed, given.mutations)) + "\n")


if __name__ == "__main__":
    main()
