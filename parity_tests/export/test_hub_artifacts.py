"""Artifacts on the hub: pushed to and loaded from a stand-in, which may be hostile."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hub_stand_in import TOKEN, Hub
from support import rewrite

from ettin.artifacts.errors import (
    DamagedArtifact,
    DownloadError,
    EttinError,
    ManifestError,
    MissingDependency,
    OutputError,
    UnverifiedArtifact,
    UsageError,
)
from ettin.artifacts.manifest import Manifest
from ettin.export.push import check_push, push
from ettin.export.source.resolve import download
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import load
from ettin.runtimes.commands import pack, rerank, triton, verify
from ettin.runtimes.hub import located, parsed

Artifacts = dict[tuple[str, str], Path]
PAIRS = [("red planet", "Mars is the red planet."), ("red planet", "Bread needs flour.")]
FOLDER = "onnx-fp32"

# Raised inside the hub's client, not by our calls.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def pushed(hub: Hub, demo_artifacts: Artifacts) -> str:
    """The hub id of an artifact, without its revision."""
    hub.commit(
        "org/name", {f"{FOLDER}/{name}": content for name, content in contents(demo_artifacts["onnx", "fp32"]).items()}
    )
    return f"org/name/{FOLDER}"


def pinned(hub: Hub) -> str:
    return f"org/name@{hub.head('org/name')}/{FOLDER}"


def refused(name: str, kind: type[EttinError]) -> str:
    with pytest.raises(kind) as error:
        load(name)
    assert str(error.value).isprintable()
    return str(error.value)


def test_export_and_push_and_load(hub: Hub, tmp_path: Path, export_here: Callable[..., Any]) -> None:
    done = export_here("--size", "demo", "--target", "transformers", "--max-length", "64", "--push", "org/name")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ettin-reranker-demo/transformers-fp32\n"
    commit = hub.head("org/name")
    assert f"{hub.url}/org/name/tree/{commit}\n" in done.stderr
    assert f"load('org/name@{commit}/transformers-fp32')" in done.stderr
    assert TOKEN not in done.stderr + done.stdout and "\r" not in done.stderr  # nor progress bars of the client
    assert hub.private["org/name"] and len(hub.commits["org/name"]) == 2  # the repository and one commit
    exported = tmp_path / "ettin-reranker-demo" / "transformers-fp32"
    loaded = located(f"org/name@{commit}/transformers-fp32")
    assert contents(loaded) == {name: content for name, content in contents(exported).items() if name != "README.md"}
    with load(loaded) as ours, load(exported) as expected:
        assert np.array_equal(ours.predict(PAIRS), expected.predict(PAIRS))
    top = hub.commits["org/name"][commit]["README.md"].decode()
    assert "license: apache-2.0" in top and "- [`transformers-fp32`](./transformers-fp32)\n" in top


def test_a_later_push_replaces_the_folder_and_keeps_the_card(hub: Hub, demo_artifacts: Artifacts) -> None:
    push({"onnx-fp32": demo_artifacts["onnx", "fp32"]}, "org/name", DEMO_FOLDER)
    files = dict(hub.commits["org/name"][hub.head("org/name")])
    files["README.md"] = files["README.md"].replace(b"# `ettin", b"Words of mine\n\n# `ettin")
    hub.commit("org/name", {**files, "onnx-fp32/onnx/stale.onnx": b"old", "notes/a.txt": b"kept"})
    commit, _ = push(
        {"onnx-fp32": demo_artifacts["onnx", "fp32"], "other": demo_artifacts["openvino", "fp32"]},
        "org/name",
        DEMO_FOLDER,
    )
    files = hub.commits["org/name"][commit]
    assert "onnx-fp32/onnx/stale.onnx" not in files and files["notes/a.txt"] == b"kept"
    top = files["README.md"].decode()
    assert "Words of mine" in top and "- [`onnx-fp32`](./onnx-fp32)\n- [`other`](./other)\n<!--" in top


def test_pushes_that_are_refused(
    hub: Hub, demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(demo_artifacts["onnx", "fp32"], tmp_path / "artifact")
    rewrite(folder, lambda content: content["parity"].update(status="unverified", pairs=0))
    with pytest.raises(UnverifiedArtifact, match="not proven. Push it all the same: --allow-unverified"):
        push({"onnx-fp32": folder}, "org/name", DEMO_FOLDER)
    with pytest.raises(UsageError, match="'my artifact' can't name a folder"):
        push({"my artifact": folder}, "org/name", DEMO_FOLDER)
    assert not hub.commits
    push({"onnx-fp32": folder}, "org/name", DEMO_FOLDER, allow_unverified=True)
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(DamagedArtifact):
        push({"onnx-fp32": folder}, "org/name", DEMO_FOLDER, allow_unverified=True)
    hub.rejects_uploads = True
    (folder / "tokenizer.json").write_bytes((demo_artifacts["onnx", "fp32"] / "tokenizer.json").read_bytes())
    with pytest.raises(DownloadError, match="--push org/new: the hub can't be reached .*What was exported stays here"):
        push({"onnx-fp32": folder}, "org/new", DEMO_FOLDER, allow_unverified=True)
    for name in ("name", "org/name@main", "org/name/folder", "../name", "a--b/c--"):
        with pytest.raises((UsageError, DownloadError)):
            check_push(name)
    check_push("org/name")
    monkeypatch.setenv("HF_TOKEN", "hf_another-secret")
    with pytest.raises(DownloadError, match="the hub refuses") as error:
        check_push("org/name")
    assert "secret" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="hf auth login"):
        check_push("org/name")


def test_a_pinned_artifact_in_the_cache_needs_no_network(
    hub: Hub, pushed: str, demo_artifacts: Artifacts, caplog: pytest.LogCaptureFixture
) -> None:
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        expected = runtime.predict(PAIRS)
    with load(pushed) as runtime:
        assert np.array_equal(runtime.predict(PAIRS), expected)
    assert f"{pushed}: commit {hub.head('org/name')}. To load the same again: {pinned(hub)}" in caplog.text
    hub.requests.clear()
    caplog.clear()
    with load(pinned(hub)) as runtime:
        assert np.array_equal(runtime.predict(PAIRS), expected)
    assert hub.requests == [] and caplog.text == ""
    with load(f"org/name@main/{FOLDER}"):
        assert hub.requests == ["GET /api/models/org/name/revision/main"]
    hub.requests.clear()
    (located(pinned(hub)) / "onnx" / "model.onnx").unlink()  # as an interrupted download of another client leaves it
    with load(pinned(hub)) as runtime:
        assert np.array_equal(runtime.predict(PAIRS), expected)
    resolved = [request for request in hub.requests if "resolve" in request and "model.sig" not in request]
    assert [request.rpartition("/")[2] for request in resolved] == ["manifest.json", "model.onnx"]


def test_only_what_the_manifest_names_is_downloaded(hub: Hub, pushed: str) -> None:
    files = hub.commits["org/name"][hub.head("org/name")]
    hub.commit(
        "org/name", {**files, f"{FOLDER}/evil.py": b"import os", f"{FOLDER}/onnx/other.onnx": b"x", "top.bin": b"x"}
    )
    folder = located(pinned(hub))
    assert set(contents(folder)) == {"manifest.json", *(entry.path for entry in Manifest.read(folder).files)}
    assert not any("evil" in request or "other" in request for request in hub.requests)


def test_what_the_client_downloaded_loads(hub: Hub, pushed: str, demo_artifacts: Artifacts) -> None:
    """Its cache has links into `blobs`, and files that the manifest does not list, such as the card."""
    import huggingface_hub

    folder = Path(huggingface_hub.snapshot_download("org/name")) / FOLDER
    assert (folder / "onnx" / "model.onnx").is_symlink() and (folder / "README.md").exists()
    hub.requests.clear()
    with load(pinned(hub)) as runtime, load(demo_artifacts["onnx", "fp32"]) as expected:
        assert np.array_equal(runtime.predict(PAIRS), expected.predict(PAIRS))
    assert hub.requests == []


def changed_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[str, bytes], bytes]:
    def tamper(path: str, content: bytes) -> bytes:
        if not path.endswith("manifest.json"):
            return content
        folder = Path(os.environ["HF_HUB_CACHE"]).with_name("tampered")
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_bytes(content)
        rewrite(folder, change)
        return (folder / "manifest.json").read_bytes()

    return tamper


def changed(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[str, bytes], bytes | None]:
    return lambda path, content: change(content) if path.endswith(name) else content


def with_first_file(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["files"][0].update(values)


def many_files(content: dict[str, Any]) -> None:
    entry = content["files"][0]
    content["files"] += [{**entry, "path": f"more/{number}"} for number in range(1000)]


@pytest.mark.parametrize(
    ("tamper", "kind", "message"),
    [
        (changed("model.onnx", lambda content: b"?" + content[1:]), DamagedArtifact, "sha256 differs"),
        (changed("model.onnx", lambda content: content + b"x"), DamagedArtifact, "the hub gives more than the"),
        (changed("model.onnx", lambda content: content[:-1]), DamagedArtifact, "bytes, expected"),
        (changed("model.onnx", lambda _: None), DownloadError, "onnx/model.onnx: the hub has no such file"),
        (changed("manifest.json", lambda _: None), DownloadError, "no such file. If it is in a folder"),
        (changed("manifest.json", lambda content: content * 2000), DamagedArtifact, "the hub gives more than the"),
        (changed("manifest.json", lambda _: b"{}"), ManifestError, "not a manifest"),
        (changed("manifest.json", lambda content: content.replace(b"7999", b"7998")), ManifestError, "was edited"),
        (changed_manifest(with_first_file(path="../x")), ManifestError, "not a plain path inside the artifact"),
        (changed_manifest(with_first_file(path="/etc/x")), ManifestError, "not a plain path inside the artifact"),
        (changed_manifest(with_first_file(path="a\x1b[2J")), ManifestError, "holds control characters"),
        (changed_manifest(with_first_file(size_bytes=10**18)), OutputError, "MiB free in"),
        (changed_manifest(many_files), ManifestError, "expected at most 1000"),
    ],
)  # fmt: skip
def test_a_tampered_artifact_is_refused(
    hub: Hub, pushed: str, tmp_path: Path, tamper: Any, kind: type[EttinError], message: str
) -> None:
    hub.tamper = tamper
    for name in (pushed, pinned(hub)):
        assert message in refused(name, kind)
    cached = tmp_path / "hub-cache" / "models--org--name"
    assert {path.name for path in cached.iterdir()} <= {"snapshots"}  # nothing half-made is left
    assert not list(cached.rglob("manifest.json"))
    hub.tamper = lambda _, content: content
    load(pinned(hub)).close()


@pytest.mark.parametrize("commit", ["0" * 40, "../../../../tmp/x", "main", ""])
def test_another_commit_than_asked_for(hub: Hub, pushed: str, commit: str) -> None:
    hub.named_commit = commit
    assert "the hub gives commit" in (text := refused(pinned(hub), DownloadError)) or "expected 40 hex digits" in text


def test_names(
    hub: Hub, pushed: str, tmp_path: Path, demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parsed("org/name") == ("org/name", None, "")
    assert parsed("org/name@v1.0/a/b") == ("org/name", "v1.0", "a/b")
    for name in ("name", "/org/name", "./org/name", "org/../name", "org/name/..", "org/name@", "org/name/a/../../b",
                 "org//name", "org/name\n", "a b/c", "-o/name", "org/.name", "org\\name/x",
                 "https://hub/org/name"):  # fmt: skip
        assert parsed(name) is None, name
        with pytest.raises(ManifestError, match="no such folder, and not a hub id"):
            load(name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_artifacts["onnx", "fp32"], tmp_path / "org" / "name" / FOLDER)
    assert located(pushed) == Path(pushed)  # a folder here wins
    assert located("org/other") == Path("org/other")  # below a folder that is here, no hub id either
    assert "org/other: no manifest.json" in refused("org/other", ManifestError)
    assert hub.requests == []
    assert located(pinned(hub)).is_relative_to(tmp_path / "hub-cache")  # a revision means the hub
    shutil.rmtree(tmp_path / "org")
    for name, message in (
        ("org/nothing", "no such repository on the hub"),
        (f"org/name@{'1' * 40}/{FOLDER}", "no such revision"),
        ("org/name@v1", "no such revision"),
        ("org/name", "If it is in a folder of the repository: ORGANISATION/NAME/FOLDER"),
    ):
        assert message in refused(name, DownloadError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r'no such folder here.*Run: pip install "ettin-export\[hub\]"'):
        load(pushed)


def test_commands_take_a_hub_id(hub: Hub, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pack, "_collect", lambda *_: None)
    for command, arguments in (
        (verify.command, [pushed, "--threads", "1"]),
        (pack.command, [pinned(hub)]),
        (triton.command, [pinned(hub), "--repository", "models"]),
        (rerank.command, [pinned(hub), "--query", "q", "-"]),
    ):
        done = CliRunner().invoke(command, arguments, input="a document\n", catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "models" / "ettin-reranker-demo-onnx-fp32").is_dir()


@pytest.mark.parametrize("by_client", [False, True], ids=["our download", "links of the client"])
def test_verify_leaves_the_cache_as_it_is(
    hub: Hub, demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_client: bool
) -> None:
    """Also where it has something to record, and the copy that the message names can be verified."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    artifact = shutil.copytree(demo_artifacts["onnx", "fp32"], tmp_path / "artifact")
    rewrite(artifact, lambda content: content["parity"].update(status="unverified", pairs=0))
    hub.commit("org/name", {f"{FOLDER}/{name}": content for name, content in contents(artifact).items()})
    if by_client:
        huggingface_hub.snapshot_download("org/name")
    cached = located(pinned(hub))
    before = contents(cached)
    assert (cached / "manifest.json").is_symlink() == by_client
    done = CliRunner().invoke(verify.command, [pinned(hub), "--threads", "1"])
    assert isinstance(done.exception, OutputError) and "worst pair: " in done.output
    expected = f"hub's cache stays as it is). Use a copy of your own: cp -rL {cached} DIR && ettin-verify DIR"
    assert str(done.exception).endswith(expected) and str(done.exception).isprintable()
    assert contents(cached) == before and (cached / "manifest.json").is_symlink() == by_client
    subprocess.run(["/bin/cp", "-rL", str(cached), "copy"], check=True)
    done = CliRunner().invoke(verify.command, ["copy", "--threads", "1"], catch_exceptions=False)
    assert done.exit_code == 0 and "marked as verified" in done.output


def test_a_command_of_its_own(hub: Hub, pushed: str, tmp_path: Path) -> None:
    code = "import sys; from ettin.runtimes.commands.rerank import main; sys.argv[0] = 'ettin-rerank'; main()"
    command = [sys.executable, "-c", code, pushed, "--query", "q"]
    done = subprocess.run(command, cwd=tmp_path, input="one\n", capture_output=True, text=True, check=True)
    assert "one" in done.stdout
    assert done.stderr == f"{pushed}: commit {hub.head('org/name')}. To load the same again: {pinned(hub)}\n"


@pytest.fixture
def client_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the hub's client logs; its logger passes nothing on."""
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("huggingface_hub").removeHandler(caplog.handler)


@pytest.mark.parametrize("problem", ["refused", "silent", "breaks"])
def test_no_connection_is_said_soon_and_once(
    hub: Hub, problem: str, monkeypatch: pytest.MonkeyPatch, client_log: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import HfApi

    commit, sleep = "0" * 40, time.sleep
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{filename}")
    reason = "refused"
    if problem == "silent":
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: sleep(2))
        reason = "no answer within 0.2 s"
    elif problem == "breaks":  # after the first answer; the client tries again and again
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=commit))
        monkeypatch.setattr(time, "sleep", lambda _: None)
    for ask in (lambda: load("org/name"), lambda: download("org/name", None), lambda: download("org/name", commit)):
        with pytest.raises(DownloadError, match=f"the hub can't be reached .*{reason}"):
            ask()
    assert client_log.text == ""
    assert logging.getLogger("huggingface_hub").level != logging.ERROR  # quiet only for as long as we ask


def test_a_checkpoint_in_the_cache_needs_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit("org/checkpoint", contents(DEMO_FOLDER))
    first = download("org/checkpoint", None)
    assert (first.id, first.revision) == ("org/checkpoint", commit)
    assert (first.folder / "README.md").exists()  # its licence goes into cards
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert download("org/checkpoint", None).weights_sha256() == first.weights_sha256()
    assert download("org/checkpoint", commit).weights_sha256() == first.weights_sha256()


def test_what_is_missing_is_said_before_any_download(export_here: Callable[..., Any], hub: Hub) -> None:
    done = export_here("--size", "68m", "--target", "trt")
    assert done.returncode == 1
    if "target 'trt' needs tensorrt" in done.stderr:
        assert 'Run: pip install "ettin-export[trt]"' in done.stderr
    assert hub.requests == [] and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("target", "module", "extra"),
    [("onnx", "onnx", "export"), ("onnx", "onnxruntime", "onnx"), ("openvino", "openvino", "export"),
     ("transformers", "transformers", "export"), ("trt-rtx", "tensorrt_rtx", "trt-rtx")],
)  # fmt: skip
def test_a_missing_package_is_said_before_any_download(
    export_here: Callable[..., Any], hub: Hub, monkeypatch: pytest.MonkeyPatch, target: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    done = export_here("--size", "68m", "--target", target)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"needs {module.replace('_', '-')}, which is not installed. Run: pip install" in done.stderr
    assert f'"ettin-export[{extra}]"' in done.stderr and hub.requests == []


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"siblings": 1}', b"null", b"[" * 100_000])
def test_answers_that_are_not_the_hubs(hub: Hub, pushed: str, answer: bytes) -> None:
    hub.raw_info = answer
    assert f"{pushed}: " in refused(pushed, DownloadError)
