"""Opens artifacts in other programs, each in an environment of its own, and compares their scores with ours.

A system is one file in `systems/`: a program that gets the path of an artifact and a precision as arguments, reads
`{"query": str, "documents": [str]}` from standard input, and prints a JSON list of scores as its last line. It begins
with comments of the form below. `requires` names the program's own package first. There can be several precisions and
errors, as in `onnx fp32, int8` and `1e-4, 2e-2`; the error of a program that is known not to work is `inf`. More
comments are for some programs: `score: sigmoid`, for one that gives sigmoid(logit), and `empty documents: no`,
for one that gets these wrong. A program whose header has `server: ettin-serve` is a client: it gets the address of a
server of the artifact, under the name `ettin`, instead of the path. `ettin-export[...]` among the requirements is this
checkout, as a wheel with these extras.

    # system: fastembed
    # artifact: onnx fp32
    # requires: fastembed==0.9.1
    # largest error: 1e-4

Run: python interop/run.py [NAME ...]. Results go to `results/`, and the page `docs/interop.md` is made from them.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ettin.bench.load import http_server
from ettin.runtimes import load

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "interop.md"
WORK = ROOT / ".work"  # environments and artifacts
# Of each target: the precisions that are exported, together if its artifacts can hold several.
ARTIFACTS = {"onnx": ("fp32,fp16,int8",), "openvino": ("fp32",), "transformers": ("fp32",)}
QUERY = "Which planet is known as the Red Planet?"
DOCUMENTS = [
    "Venus is often called Earth's twin because of its similar size.",
    "Mars, with its reddish appearance, is known as the Red Planet.",
    "Jupiter, the largest planet, has a prominent red spot.",
    "",
    "Ein roter Planet 🙂 – c'est Mars,\tet non Vénus.",
    "Saturn has rings of ice. " * 60,
]
_HEADER = re.compile(r"^(?:#|//) ([a-z ]+): (.+)$", re.MULTILINE)
_LIMIT_S = 300


@dataclass(frozen=True)
class System:
    """One file in `systems/`."""

    path: Path
    name: str
    target: str
    precisions: tuple[str, ...]
    requires: tuple[str, ...]
    limits: tuple[float, ...]  # largest error that is accepted, for each precision
    score: str
    takes_empty: bool
    is_client: bool

    @property
    def way(self) -> str:
        """How it gets its scores, for the page."""
        if self.is_client:
            return "asks `ettin-serve`"
        is_ours = any(requirement.startswith("ettin-export") for requirement in self.requires)
        return "imports our package" if is_ours else "opens the folder"

    @property
    def code(self) -> str:
        """The program without its header."""
        return _HEADER.sub("", self.path.read_text(encoding="utf-8")).lstrip()


@dataclass(frozen=True)
class Result:
    """What happened with one precision."""

    precision: str
    largest_error: float | None
    problem: str | None  # why it can't be used, in its own words


def systems() -> list[System]:
    """All systems, in the order of their file names."""
    return [system_of(path) for path in sorted((ROOT / "systems").iterdir()) if path.suffix in (".py", ".mjs")]


def system_of(path: Path) -> System:
    """Reads the header of a file."""
    header = dict(_HEADER.findall(path.read_text(encoding="utf-8")))
    target, *precisions = re.split(r",? ", header["artifact"])
    limits = tuple(map(float, header["largest error"].split(", ")))
    requires = tuple(header["requires"].split())
    score, takes_empty = header.get("score", "logit"), header.get("empty documents") != "no"
    is_client = "server" in header
    return System(path, header["system"], target, tuple(precisions), requires, limits, score, takes_empty, is_client)


def run(system: System, artifact: Path, command: list[str | Path]) -> list[Result]:
    """Runs a system on an artifact, once for each precision."""
    return [_run_precision(system, artifact, precision, command) for precision in system.precisions]


def _run_precision(system: System, artifact: Path, precision: str, command: list[str | Path]) -> Result:
    query, documents = QUERY, [document for document in DOCUMENTS if document or system.takes_empty]
    with load(artifact, precision=precision) as runtime:
        pairs = [(query, document) for document in documents]
        ours = runtime.predict(pairs, activation_fn="identity").astype(np.float64)
    if system.score == "sigmoid":
        ours = 1 / (1 + np.exp(-ours))
    question = json.dumps({"query": query, "documents": documents})
    with served(artifact, precision) if system.is_client else nullcontext(artifact) as place:
        words = [*command, place, precision]
        done = subprocess.run(words, input=question, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    if done.returncode:
        return Result(precision, None, _reason(done.stderr))
    scores = np.array(json.loads(done.stdout.strip().splitlines()[-1]), float)
    if scores.shape != ours.shape or not np.isfinite(scores).all():
        return Result(precision, None, f"its scores are {scores.tolist()}")
    return Result(precision, float(f"{np.abs(scores - ours).max():.1e}"), None)


@contextmanager
def served(artifact: Path, precision: str) -> Iterator[str]:
    """The address of a server of the artifact."""
    with http_server(artifact, "--precision", precision, "--name", "ettin") as (_, port):
        yield f"http://127.0.0.1:{port}"


def _reason(trace: str) -> str:
    """The message of the error that ended a program, without paths of this machine."""
    lines = [line for line in trace.splitlines() if re.match(r"^(\w+\.)*\w*(Error|Exception)\b", line)]
    line = (lines or trace.strip().splitlines() or ["no message"])[-1]
    return line.replace(f"{WORK}/", "").replace(str(Path.home()), "~")[:300]


def failures(system: System, results: list[Result]) -> list[str]:
    """What is not as the header says; a system whose header has the limit `inf` is not expected to work."""
    return [
        f"{system.name}, {result.precision}: {result.problem or f'largest error {result.largest_error}, limit {limit}'}"
        for result, limit in zip(results, system.limits, strict=True)
        if limit != float("inf") and (result.largest_error is None or result.largest_error > limit)
    ]


def environment(system: System) -> list[str | Path]:
    """The command that runs a system in an environment with its requirements, which is made if it is missing."""
    folder = WORK / re.sub(r"[^\w.=-]+", "_", "-".join(sorted(system.requires)))
    if system.path.suffix == ".mjs":
        if not (folder / "node_modules").is_dir():
            folder.mkdir(parents=True)
            (folder / "package.json").write_text('{"private": true}\n')
            npm = ["npm", "install", "--silent", "--prefix", folder, *system.requires]
            # Without this, onnxruntime-node downloads libraries for CUDA.
            subprocess.run(["env", "ONNXRUNTIME_NODE_INSTALL=skip", *npm], check=True)
        return ["node", shutil.copy(system.path, folder)]  # Node looks for packages beside the program
    python = folder / "bin" / "python"
    requires = [word for word in system.requires if not word.startswith("ettin-export")]
    ours = [f"{word} @ {wheel().as_uri()}" for word in system.requires if word not in requires]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    if not (folder / "made").is_file():
        venv.create(folder, with_pip=True, clear=True)
        # As in the Makefile: the build of torch for CPUs, where its index can be reached.
        torch = [requirement for requirement in requires if requirement.startswith("torch==")]
        index = ["--retries", "1", "--timeout", "10", "--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        if (
            torch
            and subprocess.run([*pip, *index, f"{torch[0]}+cpu"], check=False, stderr=subprocess.DEVNULL).returncode
        ):
            subprocess.run([*pip, *torch], check=True)
        subprocess.run([*pip, *requires, *ours], check=True)
        if torch:  # the package index has torchvision for CUDA only, with which a torch for CPUs does not start
            subprocess.run([*pip[:-2], "uninstall", "-qy", "torchvision"], check=True)
        (folder / "made").touch()
    if ours:  # this code, not that of the day on which the environment was made
        subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel()], check=True)
    return [python, system.path]


@functools.cache
def wheel() -> Path:
    """A wheel of this checkout."""
    folder = WORK / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT.parent]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)
    return next(folder.glob("*.whl"))


def artifacts() -> dict[str, Path]:
    """An artifact of each target, made from the demo checkpoint if it is missing."""
    export = Path(sys.executable).with_name("ettin-export")
    for target, precisions in ARTIFACTS.items():
        if not (WORK / "artifacts" / target).is_dir():
            words = ["--size", "demo", "--target", target, "--precision", *precisions]
            subprocess.run([export, *words, "--output", WORK / "artifacts" / target], check=True)
    return {target: WORK / "artifacts" / target for target in ARTIFACTS}


def page() -> str:
    """`docs/interop.md`, from the systems and their results."""
    rows, snippets = [], []
    for system in systems():
        stored = json.loads((ROOT / "results" / f"{system.path.stem}.json").read_text(encoding="utf-8"))
        version = stored["requires"][0]
        for result in stored["results"]:
            error = result["problem"] or f"{result['largest_error']:.0e}".replace("0e+00", "0")
            scale = "" if system.score == "logit" or result["problem"] else f" ({system.score})"
            link = f"[{system.name}](#{system.path.stem.replace('_', '-')})"
            artifact = f"`{system.target}` {result['precision']}"
            rows.append(f"| {link} | {version} | {system.way} | {artifact} | {error}{scale} |")
        language = "python" if system.path.suffix == ".py" else "js"
        mark = "<!-- not run: `make interop` runs it in an environment of its own -->\n" if language == "python" else ""
        anchor = f'<a id="{system.path.stem.replace("_", "-")}"></a>'
        snippets.append(f"{anchor}\n\n### {system.name}\n\n{mark}```{language}\n{system.code}```\n")
    text = (ROOT / "page.md").read_text(encoding="utf-8")
    return text.replace("ROWS\n", "\n".join(rows) + "\n").replace("SNIPPETS\n", "\n".join(snippets))


def main() -> None:
    """Runs the named systems, or all of them."""
    made, failed = artifacts(), []
    for system in systems():
        if sys.argv[1:] and system.path.stem not in sys.argv[1:]:
            continue
        results = run(system, made[system.target], environment(system))
        stored = {"requires": system.requires, "results": [asdict(result) for result in results]}
        path = ROOT / "results" / f"{system.path.stem}.json"
        path.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for result in results:
            print(system.name, result.precision, result.problem or result.largest_error, flush=True)
        failed += failures(system, results)
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
