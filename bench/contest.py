"""Contestants on the same pairs: each in a process of its own, rounds interleaved."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ettin.artifacts.errors import EttinError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.metrics import score_error
from ettin.runtimes.commands import console
from ettin.runtimes.tokenizer import PairTokenizer

Pairs = Sequence[tuple[str, str]]
_CONTESTANT = Path(__file__).parent / "contestant.py"
_ENOUGH_FOR_P99 = 20  # requests; the 99th percentile of fewer is their maximum


@dataclass
class Contestant:
    """One entry.

    Args:
        name: in the table.
        kind: see `contestant.KINDS`.
        arguments: of that kind.
        batch: what it is told to cut batches by: tokens for artifacts, pairs for others; None: its own choice.
        python: the interpreter of the environment that it lives in.
    """

    name: str
    kind: str
    arguments: list[str]
    batch: int | None = None
    python: str = sys.executable
    passes_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


# What a user would run instead: kind and arguments, after the checkpoint's folder.
PEERS: dict[str, tuple[str, ...]] = {
    "st-fp32": ("cross-encoder", "float32", "32"),
    "st-fp32-tuned": ("cross-encoder", "float32", "best"),
    "st-bf16": ("cross-encoder", "bfloat16", "32"),
    "traced": ("traced", "default"),
    "traced-f32": ("traced", "f32"),
    "traced-int8": ("traced", "int8"),
}

# Whose scores the others' are compared with, whichever takes part.
_REFERENCES = ("st-fp32", "st-fp32-tuned", "sentence-transformers fp32")


def artifact_name(path: Path) -> str:
    """What an artifact is called in a result."""
    return f"{path.resolve().parent.name}/{path.name}"


def artifact_entries(artifacts: Sequence[Path], settings: Mapping[str, Any]) -> list[Contestant]:
    """Our artifacts.

    Args:
        artifacts: their folders.
        settings: for `load`.
    """
    return [Contestant(artifact_name(path), "artifact", [str(path), json.dumps(dict(settings))]) for path in artifacts]


def contestants(
    artifacts: Sequence[Path], settings: Mapping[str, Any], checkpoint: Path | None, peers: Sequence[str]
) -> list[Contestant]:
    """Our artifacts, and the peers that were asked for.

    Args:
        artifacts: their folders.
        settings: for `load`.
        checkpoint: what the peers are made from.
        peers: see `PEERS`.

    Raises:
        UsageError: an unknown peer, or peers without a checkpoint.
    """
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise UsageError(f"unknown peer '{unknown[0]}', expected some of: {', '.join(PEERS)}")
    if peers and checkpoint is None:
        raise UsageError("peers are made from the checkpoint: name it with --checkpoint DIR")
    others = [Contestant(peer, PEERS[peer][0], [str(checkpoint), *PEERS[peer][1:]]) for peer in peers]
    return artifact_entries(artifacts, settings) + others


@dataclass(frozen=True)
class Contest:
    """What all contestants do.

    Args:
        pairs: what a pass scores.
        candidates: documents of a latency request, each with the first query of its documents.
        max_length: tokens that pairs are truncated to.
        rounds: passes of each, interleaved, after one that is not counted.
        requests: latency requests after each pass, different ones.
        environment: variables that every process starts with.
        warm: load our artifacts once before, so that they find their cache filled.
    """

    pairs: Pairs
    candidates: int
    max_length: int
    rounds: int
    requests: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    warm: bool = False

    def run(self, entries: Sequence[Contestant]) -> None:
        """Runs the rounds and fills the entries; one that fails says why and takes no further part."""
        with ExitStack() as stack:
            running = []
            for entry in entries:
                if entry.problem is not None:
                    continue
                try:
                    if self.warm and entry.kind == "artifact":
                        with self.started(entry):
                            pass
                    running.append((entry, stack.enter_context(self.started(entry))))
                except EttinError as error:
                    entry.problem = str(error)
            for turn in range(self.rounds + 1):
                for entry, child in running:
                    if entry.problem is None:
                        self._turn(entry, child, turn)

    @contextmanager
    def started(self, entry: Contestant) -> Iterator["Child"]:
        """An entry's process, loaded; its facts are filled in.

        Raises:
            EttinError: it died, with the last line that it wrote.
        """
        variables = {**os.environ, **self.environment, "TOKENIZERS_PARALLELISM": "true"}
        # -P: the folder of the script holds modules named like those of the standard library.
        process = subprocess.Popen(
            [entry.python, "-P", str(_CONTESTANT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables,
        )  # fmt: skip
        child = Child(process)
        try:
            settings = {"pairs": list(self.pairs), "candidates": self.candidates, "max_length": self.max_length}
            order = {"kind": entry.kind, "arguments": entry.arguments, "batch": entry.batch, **settings}
            entry.facts = child.ask(order)
            yield child
        finally:
            process.kill()
            process.communicate()

    def _turn(self, entry: Contestant, child: "Child", turn: int) -> None:
        try:
            passed = child.ask({"do": "pass"})
            latencies = [child.ask({"do": "latency", "request": at}) for at in range(self.requests)]
        except EttinError as error:
            entry.problem = str(error)
            return
        entry.facts |= {key: value for key, value in latencies[-1].items() if key not in ("seconds", "scores")}
        entry.facts["padding_share"] = passed["padding_share"]
        entry.scores = passed["scores"]
        if turn:  # the first is not counted
            entry.passes_s.append(passed["seconds"])
            entry.latencies_s += [each["seconds"] for each in latencies]


@dataclass
class Child:
    """A running contestant; see `contestant.py` for what it can be asked."""

    process: subprocess.Popen[str]

    def tell(self, order: dict[str, Any]) -> None:
        """Sends an order that has no answer."""
        assert self.process.stdin  # noqa: S101 (pipes were asked for)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Sends an order and waits for its answer.

        Raises:
            EttinError: the process died; with the last line of its errors.
        """
        process = self.process
        assert process.stdout and process.stderr  # noqa: S101 (pipes were asked for)
        try:
            self.tell(order)
            for line in process.stdout:
                if line.startswith('{"contestant"'):  # libraries print to stdout, too
                    answer: dict[str, Any] = json.loads(line)["contestant"]
                    return answer
        except BrokenPipeError:
            pass
        code = process.wait()
        reason = (process.stderr.read().strip().splitlines() or ["no message"])[-1]
        raise EttinError(f"died with signal {-code}" if code < 0 else reason)


def result(entry: Contestant, pairs: int, reference: Contestant | None) -> dict[str, Any]:
    """The figures of one contestant; its scores are compared with the reference's, if that ran."""
    if entry.problem is not None or not entry.passes_s:
        return {"name": entry.name, "problem": entry.problem}
    milliseconds = 1000 * np.array(entry.latencies_s)
    percentiles = (50, 95, 99) if len(milliseconds) >= _ENOUGH_FOR_P99 else (50, 95)
    figures: dict[str, Any] = {
        "name": entry.name,
        **entry.facts,
        "pairs_per_s": pairs / float(np.median(entry.passes_s)),
        "pairs_per_s_best": pairs / min(entry.passes_s),
        "passes_s": entry.passes_s,
        "latencies_ms": milliseconds.round(2).tolist(),
        **{f"latency_p{each}_ms": float(np.percentile(milliseconds, each)) for each in percentiles},
        "nan": int(np.isnan(entry.scores).sum()),
    }
    if reference and reference.scores and not figures["nan"]:
        figures |= score_error(entry.scores, reference.scores).figures()
    return figures


def measured(
    contest: Contest, entries: Sequence[Contestant], artifacts: Sequence[Path], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """Runs a contest and says who took part, on stderr.

    Args:
        contest: what is run.
        entries: the contestants.
        artifacts: ours among them.
        lengths: tokens of each pair; see `token_lengths`.

    Returns:
        The figures of each contestant, errors against sentence-transformers in fp32 if that took part.
    """
    count = len(contest.pairs)
    with console.step(f"{contest.rounds} rounds of {count} pairs"):
        contest.run(entries)
    reference = next((entry for entry in entries if entry.name in _REFERENCES), None)
    results = [result(entry, count, reference) for entry in entries]
    sizes = {artifact_name(path): size_mib(path) for path in artifacts}
    for each in results:
        if "pairs_per_s" in each:
            each["tokens_per_s"] = each["pairs_per_s"] * sum(lengths) / count
            each["size_mib"] = sizes.get(each["name"])
        console.note(f"{each['name']}: {each.get('description') or each['problem']}")
    return results


def token_lengths(contest: Contest, artifact: Path) -> list[int]:
    """Tokens of each pair, as the artifact's tokenizer counts them."""
    tokenizer = PairTokenizer(artifact / "tokenizer.json")
    return [len(ids) for ids in tokenizer.pairs(contest.pairs, contest.max_length)]


def weights_of(artifacts: Sequence[Path]) -> str:
    """'random' if any artifact's weights are, else 'checkpoint'."""
    found = {Manifest.read(path).source.weights for path in artifacts}
    return "random" if "random" in found else "checkpoint"


def size_mib(artifact: Path) -> float:
    """Of an artifact's files."""
    return round(sum(each.size_bytes for each in Manifest.read(artifact).files) / 2**20, 1)
