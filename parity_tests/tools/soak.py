"""The long form of the attacks: damaged artifacts, killed exports, hostile clients, and mixed load with faults.

    python parity_tests/soak.py --minutes 10 --json bench/results/soak/DATE.json

`make soak` runs it. It exports the embedded checkpoint, attacks loopback servers of its own only, writes what was tried
and what survived, and ends with exit code 1 if something did not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import campaign_damage
import campaign_http
import httpx
import numpy as np
from service import Service

from ettin.bench.load import SERVERS, ServedArtifact, mixed_load, requests_with_gold
from ettin.bench.machine import write_result
from ettin.export.proof_pairs import natural_pairs
from ettin.runtimes import load
from ettin.runtimes.loading import checked_manifest

CLIENTS = 32
HEALTH_S = 1.0  # more than usual, while an attack lasts
MEMORY_MIB = 100  # more than before, after an attack
VARIANTS = ("onnx-int8", "onnx-fp32", "openvino-int8", "openvino-fp32", "transformers-fp32")


def note(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def export(variant: str, output: Path) -> None:
    target, precision = variant.split("-")
    command = [Path(sys.executable).parent / "ettin-export", "--size", "demo", "--target", target]
    subprocess.run([*command, "--precision", precision, "--output", output], check=True, capture_output=True)


def damage(artifacts: dict[str, Path], mutations: int, scratch: Path) -> dict[str, Any]:
    """Random mutations of every artifact, in processes of their own."""

    def attack(job: tuple[int, str]) -> dict[str, Any]:
        seed, variant = job
        folder = scratch / f"damage-{variant}-{seed}"
        folder.mkdir()
        command = [sys.executable, campaign_damage.__file__, artifacts[variant], folder, "--seed", str(seed)]
        each = -(-mutations // (2 * len(artifacts)))
        done = subprocess.run([*command, "--mutations", str(each)], capture_output=True, text=True, check=False)
        if done.returncode:
            return {"tried": each, "failure": f"{variant}, seed {seed}: {done.returncode}: {done.stderr[-500:]}"}
        return {"tried": each, **json.loads(done.stdout.splitlines()[-1])}

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(attack, [(seed, variant) for seed in (1, 2) for variant in artifacts]))
    keys = ("tried", "sealed", "unsealed", "loaded", "refused")
    total: dict[str, Any] = {key: sum(result.get(key, 0) for result in results) for key in keys}
    failures = [result["failure"] for result in results if "failure" in result]
    longest_s = max(result.get("longest_s", 0.0) for result in results)
    return {**total, "longest_s": longest_s, "failures": failures}


def kills(output: Path, count: int) -> dict[str, Any]:
    """Exports that are killed at random moments over an artifact, which must stay whole."""
    chance, failures = random.Random(5), []
    command = [Path(sys.executable).parent / "ettin-export", "--size", "demo", "--target", "onnx", "--force"]
    for number in range(count):
        process = subprocess.Popen([*command, "--output", output], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1, 25))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        process.wait()
        try:
            checked_manifest(output)
        except Exception as error:
            failures.append(f"kill {number}: {error}")
    subprocess.run([*command, "--output", output], check=True, capture_output=True)
    left = sorted(path.name for path in output.parent.iterdir() if path != output)
    return {"tried": count, "failures": failures + [f"left behind: {name}" for name in left]}


def attacks(artifact: Path) -> dict[str, Any]:
    """Every attack on one `ettin-serve` with the default limits and 1,024 open files."""
    text = b"a sentence of words. " * (31 << 20 // 21)
    steps: dict[str, Callable[[campaign_http.Address], float]] = {
        "hostile bodies of 32 MiB": lambda at: campaign_http.send_hostile_bodies(at, 32 << 20),
        "1,200 idle connections": lambda at: campaign_http.hold_idle_connections(at, 1200, 5),
        "30 half-sent bodies of 30 MiB": lambda at: campaign_http.hold_half_bodies(at, 30, 30 << 20, 3),
        "200 slow bodies": lambda at: campaign_http.send_slow_bodies(at, 200, 10),
        "answers that nobody reads": lambda at: campaign_http.read_answers_slowly(at, 20, 200, 5),
        "a document of 31 MB": lambda at: send_document(at, text),
    }
    results: dict[str, Any] = {}
    with Service(artifact, "--log-level", "warning", open_files=1024) as service:
        address = ("127.0.0.1", service.port)
        with campaign_http.watched_health(address) as usual_s:
            time.sleep(2)
        service.http.post("/rerank", json={"query": "q", "texts": ["some words " * 50] * 500})
        for name, attack in steps.items():
            before_mib = service.memory_mib()
            longest_s = attack(address)
            ended_s = time.monotonic()
            time.sleep(3)
            while service.memory_mib() > before_mib + MEMORY_MIB and time.monotonic() < ended_s + 20:
                time.sleep(0.2)  # answers that nobody reads are dropped when their time is over
            results[name] = {
                "health_s": round(longest_s, 3),
                "before_mib": before_mib,
                "after_mib": service.memory_mib(),
                "returned_after_s": round(time.monotonic() - ended_s, 1),
            }
            note(f"{name}: {results[name]}")
        results["stopped for 3 s"] = stopped(service)
    failures = [
        f"{name}: {result}"
        for name, result in results.items()
        if result.get("health_s", 0) > usual_s() + HEALTH_S
        or result.get("after_mib", 0) > result.get("before_mib", 0) + MEMORY_MIB
    ]
    return {"tried": len(results), "usual_health_s": round(usual_s(), 3), "results": results, "failures": failures}


def send_document(address: campaign_http.Address, text: bytes) -> float:
    body = b'{"query":"q","documents":["' + text + b'"]}'
    with campaign_http.watched_health(address) as longest_s:
        headers = {"Content-Type": "application/json"}
        url = f"http://{address[0]}:{address[1]}/v2/rerank"
        assert httpx.post(url, content=body, headers=headers, timeout=60).status_code in (200, 413)
    return longest_s()


def stopped(service: Service) -> dict[str, Any]:
    """SIGSTOP, SIGCONT: what was asked meanwhile is answered afterwards."""
    service.process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        body = {"query": "q", "texts": ["a", "b"]}
        asked = [pool.submit(service.http.post, "/rerank", json=body) for _ in range(8)]
        time.sleep(3)
        service.process.send_signal(signal.SIGCONT)
        assert all(future.result().status_code == 200 for future in asked)
    return {"answers": len(asked)}


@contextmanager
def faults(name: str, served: ServedArtifact) -> Iterator[Counter[str]]:
    """Hostile and unlucky clients, one after the other until the end of the block; yields how often each attacked."""
    stop, counts, address = threading.Event(), Counter[str](), ("127.0.0.1", served.port)

    def attack_http(turn: int) -> str:
        kinds: list[tuple[str, Callable[[], object]]] = [
            ("hostile bodies", lambda: campaign_http.send_hostile_bodies(address, 1 << 20)),
            ("idle connections", lambda: campaign_http.hold_idle_connections(address, 300, 1)),
            ("half bodies", lambda: campaign_http.hold_half_bodies(address, 5, 8 << 20, 1)),
            ("slow bodies", lambda: campaign_http.send_slow_bodies(address, 30, 2)),
            ("disconnects", lambda: [disconnect(address) for _ in range(20)]),
            ("long document", lambda: send_document(address, b"a sentence of words. " * 40_000)),
        ]
        kinds[turn % len(kinds)][1]()
        return kinds[turn % len(kinds)][0]

    def attack_triton(turn: int) -> str:
        from tritonclient import grpc

        kinds = ("cancelled", "not UTF-8", "long document", "wrong shape")
        kind = kinds[turn % len(kinds)]
        document = {"not UTF-8": b"\xff", "long document": b"a sentence of words. " * 400_000}.get(kind, b"words " * 50)
        count = 0 if kind == "wrong shape" else 200 if kind == "cancelled" else 1
        with grpc.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            tensors = []
            for tensor, texts in (("query", [b"q"]), ("documents", [document] * count)):
                tensors.append(grpc.InferInput(tensor, [1, len(texts)], "BYTES"))
                tensors[-1].set_data_from_numpy(np.array([texts], np.object_).reshape(1, len(texts)))
            try:
                client.infer("reranker", tensors, client_timeout=0.05 if kind == "cancelled" else 60)
            except Exception as error:
                assert "CANCEL" in str(error) or "Deadline" in str(error) or "UTF-8" in str(error), error
        return kind

    problems: list[str] = []

    def work() -> None:
        turn = 0
        while not stop.wait(0.5):
            try:
                counts[(attack_http if name == "http" else attack_triton)(turn)] += 1
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}"[:300])
            turn += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()
        counts["problems"] = len(problems)
        for problem in problems[:5]:
            note(f"fault on {name}: {problem}")


def disconnect(address: campaign_http.Address) -> None:
    """A client that asks for many documents and leaves before the answer."""
    body = json.dumps({"query": "q", "texts": ["words " * 100] * 300})
    headers = {"Content-Type": "application/json"}
    with suppress(httpx.TimeoutException):
        httpx.post(f"http://{address[0]}:{address[1]}/rerank", content=body, timeout=0.1, headers=headers)


def loaded(artifact: Path, minutes: float) -> dict[str, Any]:
    """Mixed load from many clients through both servers at the same time, with faults beside it."""
    pairs = [(pair.query, pair.document) for pair in natural_pairs()]
    with load(artifact, max_length=512) as runtime:
        asked, tolerance = requests_with_gold(runtime, pairs, 64, 30)

    def serve(name: str) -> dict[str, Any]:
        with SERVERS[name](artifact, 512) as served:
            clients = [served.client() for _ in range(CLIENTS)]
            with faults(name, served) as counts:
                tally, memory_mib = mixed_load(served, clients, asked, tolerance, minutes * 60)
        return {**tally.figures(), "minutes": minutes, "memory_mib": memory_mib, "faults": dict(counts)}

    with ThreadPoolExecutor(len(SERVERS)) as pool:
        results = dict(zip(SERVERS, pool.map(serve, SERVERS), strict=True))
    failures = []
    for name, result in results.items():
        note(f"{name}: {result}")
        memory_mib = result["memory_mib"]
        growth_mib = memory_mib[-1] - max(memory_mib[: len(memory_mib) // 2])
        if result["wrong"] or result["lost"] or result["faults"]["problems"] or growth_mib > MEMORY_MIB:
            failures.append(
                f"{name}: {result['wrong']} wrong, {result['lost']} lost, memory grew by {growth_mib:.0f} MiB"
            )
    return {"tried": sum(result["answers"] for result in results.values()), "results": results, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="Time of mixed load on each server, in minutes.")
    parser.add_argument("--mutations", type=int, default=3500, help="Number of damaged artifacts.")
    parser.add_argument("--kills", type=int, default=64, help="Number of exports to kill.")
    parser.add_argument("--only", choices=["damage", "kills", "attacks", "load"], help="Run one part.")
    parser.add_argument("--json", type=Path, help="Result file.")
    given = parser.parse_args()
    os.environ.pop("ETTIN_API_KEY", None)
    with tempfile.TemporaryDirectory(prefix="ettin-soak-") as folder:
        scratch = Path(folder)
        kept = Path(os.environ.get("ETTIN_TEST_ARTIFACTS", scratch / "artifacts"))  # as in conftest.py
        artifacts = {variant: kept / variant for variant in VARIANTS}
        for variant, output in artifacts.items():
            if not output.exists():
                note(f"export {variant}")
                export(variant, output)
        shutil.copytree(artifacts["onnx-fp32"], scratch / "killed" / "artifact")
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "attacks": lambda: attacks(artifacts["onnx-int8"]),
            "load": lambda: loaded(artifacts["openvino-int8"], given.minutes),
            "damage": lambda: damage(artifacts, given.mutations, scratch),
            "kills": lambda: kills(scratch / "killed" / "artifact", given.kills),
        }
        result: dict[str, Any] = {}
        for name, part in parts.items():
            if given.only in (None, name):
                note(name)
                result[name] = part()
                note(f"{name}: tried {result[name]['tried']}, failures {result[name]['failures']}")
    if given.json:
        write_result(given.json, "soak", result, "make soak")
    if any(part["failures"] for part in result.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
