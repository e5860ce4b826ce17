"""The commands, as a user types them."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import run

from ettin.export import pipeline
from ettin.export.proof_pairs import natural_pairs

PLANETS = Path(__file__).parents[2] / "examples" / "planets.txt"


Export = Callable[..., subprocess.CompletedProcess[str]]


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("verified_here")
def test_export_rerank_verify(tmp_path: Path, export_here: Export) -> None:
    exported = export_here("--size", "demo", "--target", "openvino", "--max-length", "128")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout == "ettin-reranker-demo/openvino-int8\n"
    for step in (
        "read the checkpoint",
        "score 907 pairs",
        "write openvino fp32",
        "write openvino int8",
        "verify int8",
        "nDCG@10",
    ):
        assert step in exported.stderr
    artifact = tmp_path / exported.stdout.strip()
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["command"] == "ettin-export --size demo --target openvino --max-length 128"
    assert manifest["max_length_tokens"] == 128

    again = export_here("--size", "demo", "--target", "openvino")
    assert_one_line(again, "left as it is. Replace it with --force")

    verified = run("ettin-verify", artifact, cwd=tmp_path)
    assert verified.returncode == 0 and "ok (Spearman ≥ 0.99 over all pairs" in verified.stdout

    query = "Which planet is known as the Red Planet?"
    table = run("ettin-rerank", artifact, "--query", query, PLANETS, cwd=tmp_path)
    assert "Mars" in table.stdout.splitlines()[1]
    lines = run(
        "ettin-rerank", artifact, "--query", query, "--json", "--top-k", "2", cwd=tmp_path, stdin=PLANETS.read_text()
    )
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [row["rank"] for row in rows] == [1, 2] and rows[0]["text"].startswith("Mars") and rows[0]["line"] == 2


def test_json_lines_keep_their_keys(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    documents = "".join(
        json.dumps({"id": at, "body": text}) + "\n\n" for at, text in enumerate(["hot Venus", "the [red] planet"])
    )
    artifact = demo_artifacts["onnx", "fp32"]
    done = run(
        "ettin-rerank",
        artifact,
        "--query",
        "red planet",
        "--field",
        "body",
        "--json",
        "-",
        cwd=tmp_path,
        stdin=documents,
    )
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [1, 0]
    table = run("ettin-rerank", artifact, "--query", "red planet", "--field", "body", cwd=tmp_path, stdin=documents)
    assert "the [red] planet" in table.stdout


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ('{"text": "a"}\nplain\n', "line 2: expected a JSON object with a string 'text'"),
        ('{"body": "a"}\n', "line 1: expected a JSON object with a string 'text'"),
    ],
)
def test_bad_lines(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, stdin: str, message: str) -> None:
    done = run("ettin-rerank", demo_artifacts["onnx", "fp32"], "--query", "q", cwd=tmp_path, stdin=stdin)
    assert_one_line(done, message)


def test_bad_files(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    artifact = demo_artifacts["onnx", "fp32"]
    assert_one_line(run("ettin-rerank", artifact, "--query", "q", "missing.txt", cwd=tmp_path), "no such file")
    assert_one_line(run("ettin-rerank", artifact, "--query", "q", ".", cwd=tmp_path), "can't be read")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert_one_line(run("ettin-rerank", artifact, "--query", "q", "latin.txt", cwd=tmp_path), "not UTF-8 text")
    assert_one_line(run("ettin-rerank", tmp_path, "--query", "q", cwd=tmp_path), "this is not an artifact")
    assert run("ettin-rerank", artifact, "--query", "q", cwd=tmp_path, stdin="").returncode == 0


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and nothing of it in a cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "70m"], "unknown size '70m', expected one of: demo, 17m, 32m, 68m, 150m, 400m, 1b"),
        (
            ["--size", "demo", "--target", "tpu"],
            "unknown target 'tpu', expected one of: onnx, openvino, transformers, trt, trt-rtx",
        ),
        (["--size", "demo", "--precision", "int4"], "has no precision 'int4', expected one of: int8, bf16, fp32"),
        (["--size", "demo", "--all", "--precision", "int4"], "no target has a precision 'int4'"),
        (["--size", "demo", "--max-length", "9000"], "--max-length is 9000, expected 8 to 7999"),
        (["--size", "demo", "--output", "/proc/out"], "Choose another: --output DIR"),
        (["--size", "demo", "--verify-pairs", "missing.jsonl"], "missing.jsonl: can't be read"),
        (["--size", "demo", "--calibration", "missing.jsonl"], "missing.jsonl: can't be read"),
        (["--size", "17m"], "the hub can't be reached"),
        (["--size", "17m"], "--checkpoint DIR"),
        (["--checkpoint", "somebody/some-reranker"], "the hub can't be reached"),
        (["--checkpoint", "./nowhere"], "no such folder, and not a hub id"),
        (["--checkpoint", "."], "no modules.json"),
        (["--target", "onnx"], "name one checkpoint"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str, export_here: Export) -> None:
    assert_one_line(export_here(*arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_bad_verify_pairs(tmp_path: Path, export_here: Export) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "document": "b"}\n{"query": "a"}\n')
    done = export_here("--size", "demo", "--verify-pairs", "pairs.jsonl")
    assert_one_line(done, "pairs.jsonl, line 2: expected a JSON object with strings 'query' and 'document'")


def test_dry_run_writes_nothing(tmp_path: Path, export_here: Export) -> None:
    done = export_here("--size", "demo", "--all", "--dry-run")
    assert done.returncode == 0 and done.stdout.count("would write") == 8
    assert "to ettin-reranker-demo/onnx-fp16, once its scores are proven" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("verified_here")
def test_random_weights_are_said_loudly(tmp_path: Path, export_here: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "proof_pairs", lambda extra, ranking: natural_pairs()[:64])  # scores mean nothing
    done = export_here("--size", "17m", "--random-weights", "--max-length", "24", "--target", "onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ettin-reranker-17m-v1-random/onnx-fp32"
    assert "RANDOM WEIGHTS" in done.stderr
    artifact = tmp_path / done.stdout.strip()
    assert "**Random weights.**" in (artifact / "README.md").read_text()
    manifest: dict[str, Any] = json.loads((artifact / "manifest.json").read_text())
    assert manifest["source"]["weights"] == "random" and manifest["parity"]["quality"] == "not-applicable"


def test_failing_export_leaves_the_old_artifact(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, export_here: Export
) -> None:
    """A forced export of a checkpoint that does not even load."""
    import shutil

    output = tmp_path / "artifact"
    shutil.copytree(demo_artifacts["onnx", "fp32"], output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (tmp_path / "broken").mkdir()
    done = export_here("--checkpoint", "broken", "--output", "artifact", "--force")
    assert done.returncode == 1
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


@pytest.mark.parametrize("command", ["ettin-export", "ettin-rerank", "ettin-verify", "ettin-bench", "ettin-gpu"])
def test_help(command: str, tmp_path: Path) -> None:
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Usage" in done.stdout


def test_doctor_and_list(tmp_path: Path) -> None:
    doctor = run("ettin-export", "--doctor", cwd=tmp_path)
    assert doctor.returncode == 0 and "target openvino" in doctor.stdout and "usable" in doctor.stdout
    listed = run("ettin-export", "--list", cwd=tmp_path)
    assert "9e4aa35321a6" in listed.stdout and "transformers" in listed.stdout


def test_hostile_lines(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    rerank = ("ettin-rerank", demo_artifacts["onnx", "fp32"], "--query", "q")
    deep = "[" * 100_000
    table = run(*rerank, cwd=tmp_path, stdin=f"{deep}\n\x1b]0;title\x07red\n")
    assert table.returncode == 0 and "\x1b" not in table.stdout and "\\x1b]0;title" in table.stdout, table.stderr
    rows = '{"line": "a", "title": "\\ud800"}\n{"line": "b", "score": "mine"}\n'
    done = run(*rerank, "--field", "line", "--json", cwd=tmp_path, stdin=rows)
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["rank"] for line in done.stdout.splitlines()} == {1, 2}
    assert {json.loads(line).get("title") for line in done.stdout.splitlines()} == {None, "\ud800"}


def test_all_refuses_a_precision_that_no_target_has(export_here: Export) -> None:
    assert_one_line(
        export_here("--size", "demo", "--all", "--precision", "int8,int9"), "no target has a precision 'int9'"
    )
