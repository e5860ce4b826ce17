"""Our artifacts against what a user would run instead, on the same pairs, interleaved, each in its own process."""

import json
import os
import statistics
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
from ettin.bench.texts import pairs_to_score
from ettin.runtimes import console
from ettin.runtimes.tokenizer import PairTokenizer

# Variables that limit each library to an instruction set. MLAS (OpenVINO's f32 GEMM, all of ONNX Runtime) obeys none of
# them, and torch's ATen knows no VNNI: see the notes of the result.
ISAS: dict[str, dict[str, str]] = {
    "all": {},
    "amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "avx512_vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2_vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
NOTES = {
    "all": "no limit",
    "amx": "oneDNN alone is limited, to bf16 and int8 tiles",
    "avx512_vnni": "OpenVINO's f32 GEMM (MLAS) and ONNX Runtime do not obey the limit",
    "avx2_vnni": "OpenVINO's f32 GEMM (MLAS) and ONNX Runtime do not obey the limit; torch is limited to AVX2",
}


@dataclass
class Contestant:
    """One entry.

    Args:
        name: in the table.
        kind: see `contestant.KINDS`.
        arguments: of that kind.
    """

    name: str
    kind: str
    arguments: list[str]
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
    ours = [
        Contestant(f"{path.parent.name}/{path.name}", "artifact", [str(path), json.dumps(dict(settings))])
        for path in artifacts
    ]
    return ours + [Contestant(peer, PEERS[peer][0], [str(checkpoint), *PEERS[peer][1:]]) for peer in peers]


def compare(
    entries: Sequence[Contestant],
    pairs: Sequence[tuple[str, str]],
    *,
    candidates: int,
    max_length: int,
    rounds: int,
    isa: str,
    warm: bool = False,
) -> None:
    """Runs the rounds and fills the entries; one that fails says why and takes no further part.

    Args:
        entries: the contestants.
        pairs: what a pass scores.
        candidates: documents of the latency request: the first ones, with the first query.
        max_length: tokens that pairs are truncated to.
        rounds: passes of each, interleaved, after one that is not counted.
        isa: see `ISAS`.
        warm: load our artifacts once before, so that they find their cache filled.
    """
    settings = {"pairs": list(pairs), "candidates": candidates, "max_length": max_length}
    with ExitStack() as stack:
        running = []
        for entry in entries:
            order = {"kind": entry.kind, "arguments": entry.arguments, **settings}
            try:
                if warm and entry.kind == "artifact":
                    with _child(ISAS[isa]) as first:
                        _ask(first, order)
                child = stack.enter_context(_child(ISAS[isa]))
                entry.facts = _ask(child, order)
                running.append((entry, child))
            except EttinError as error:
                entry.problem = str(error)
        for turn in range(rounds + 1):
            for entry, child in running:
                if entry.problem is None:
                    _turn(entry, child, counted=turn > 0)


def _turn(entry: Contestant, child: subprocess.Popen[str], counted: bool) -> None:
    try:
        passed, latency = (_ask(child, {"do": what}) for what in ("pass", "latency"))
    except EttinError as error:
        entry.problem = str(error)
        return
    entry.facts["peak_rss_mib"] = latency["peak_rss_mib"]
    entry.scores = passed["scores"]
    if counted:
        entry.passes_s.append(passed["seconds"])
        entry.latencies_s.append(latency["seconds"])


@contextmanager
def _child(environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ettin.bench.contestant"]
    variables = {**os.environ, **environment, "TOKENIZERS_PARALLELISM": "true"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _ask(child: subprocess.Popen[str], order: dict[str, Any]) -> dict[str, Any]:
    assert child.stdin and child.stdout and child.stderr  # noqa: S101 (pipes were asked for)
    try:
        child.stdin.write(json.dumps(order) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            if line.startswith("{"):  # libraries print to stdout, too
                answer: dict[str, Any] = json.loads(line)
                return answer
    except BrokenPipeError:
        pass
    code = child.wait()
    reason = (child.stderr.read().strip().splitlines() or ["no message"])[-1]
    raise EttinError(f"died with signal {-code}" if code < 0 else reason)


def result(entry: Contestant, pairs: int, reference: Contestant | None) -> dict[str, Any]:
    """The figures of one contestant; its scores are compared with the reference's, if that ran."""
    if entry.problem is not None or not entry.passes_s:
        return {"name": entry.name, "problem": entry.problem}
    latencies = sorted(entry.latencies_s)
    figures: dict[str, Any] = {
        "name": entry.name,
        **entry.facts,
        "pairs_per_s": pairs / statistics.median(entry.passes_s),
        "pairs_per_s_best": pairs / min(entry.passes_s),
        "passes_s": entry.passes_s,
        "latency_p50_ms": 1000 * statistics.median(latencies),
        "latency_p95_ms": 1000 * latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
        "nan": int(np.isnan(entry.scores).sum()),
    }
    if reference and reference.scores and not figures["nan"]:
        figures |= score_error(entry.scores, reference.scores).figures()
    return figures


@dataclass(frozen=True)
class CpuRun:
    """One interleaved comparison on CPUs; see `cpu` and `all`."""

    artifacts: Sequence[Path]
    checkpoint: Path | None
    peers: Sequence[str]
    data: Path | None = None
    count: int = 400
    rounds: int = 5
    max_length: int = 512
    fill: bool = False
    streams: int | None = None
    cache_dir: Path | None = None
    isa: str = "all"

    def measured(self) -> dict[str, Any]:
        """Runs it; the result."""
        random_weights = any(Manifest.read(path).source.weights == "random" for path in self.artifacts)
        chosen = {"streams": self.streams, "cache_dir": str(self.cache_dir) if self.cache_dir else None}
        settings = {key: value for key, value in chosen.items() if value}
        entries = contestants(self.artifacts, settings, self.checkpoint, self.peers)
        pairs = pairs_to_score(self.data, self.count, self.max_length if self.fill else None)
        candidates = min(100, len(pairs))
        with console.step(f"{self.rounds} rounds of {len(pairs)} pairs"):
            compare(
                entries, pairs, candidates=candidates, max_length=self.max_length, rounds=self.rounds, isa=self.isa,
                warm=bool(self.cache_dir),
            )  # fmt: skip
        reference = next((entry for entry in entries if entry.name.startswith("st-fp32")), None)
        results = [result(entry, len(pairs), reference) for entry in entries]
        tokenizer = PairTokenizer(self.artifacts[0] / "tokenizer.json")
        tokens = sum(len(ids) for ids in tokenizer.pairs(pairs, self.max_length))
        sizes = {f"{path.parent.name}/{path.name}": _size_mib(path) for path in self.artifacts}
        for each in results:
            if "pairs_per_s" in each:
                each["tokens_per_s"] = each["pairs_per_s"] * tokens / len(pairs)
                each["size_mib"] = sizes.get(each["name"])
            console.note(f"{each['name']}: {each.get('description') or each['problem']}")
        return {
            "data": self.data.name if self.data else "passages",
            "pairs": len(pairs),
            "tokens_per_pair": tokens / len(pairs),
            "candidates": candidates,
            "rounds": self.rounds,
            "max_length": self.max_length,
            "filled": self.fill,
            "model_cache": bool(self.cache_dir),
            "weights": "random" if random_weights else "checkpoint",
            "isa": self.isa,
            "isa_note": NOTES[self.isa],
            "contestants": results,
        }


def _size_mib(artifact: Path) -> float:
    return round(sum(each.size_bytes for each in Manifest.read(artifact).files) / 2**20, 1)
