"""What an artifact from a stranger can do: nothing. It loads as its manifest says, or ends in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign_damage
import numpy as np
import pytest
from support import reseal, rewrite

from ettin.artifacts.errors import ArtifactError, DamagedArtifact, EttinError, ManifestError
from ettin.runtimes import load

Artifacts = dict[tuple[str, str], Path]
PAIRS = [("red planet", "Mars is the red planet."), ("red planet", "Bread needs flour. " * 30)]
CHILD_TIMEOUT_S = 300


@pytest.fixture
def copied(demo_artifacts: Artifacts, tmp_path: Path) -> Callable[..., Path]:
    def copy(target: str, precision: str = "fp32") -> Path:
        folder = tmp_path / "artifact"
        shutil.copytree(demo_artifacts[target, precision], folder)
        return folder

    return copy


def scores(folder: Path, **settings: Any) -> Any:
    with load(folder, threads=1, **settings) as runtime:
        return runtime.predict(PAIRS)


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


def refused(folder: Path, kind: type[EttinError] = ArtifactError, **settings: Any) -> str:
    with pytest.raises(kind) as error:
        load(folder, threads=1, **settings)
    assert str(error.value).isprintable() and len(str(error.value)) <= 4000
    return str(error.value)


@pytest.mark.parametrize("listed", [True, False])
def test_an_artifact_can_not_run_code(copied: Any, monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    folder = copied("transformers")
    proof = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModelForSequenceClassification")
    auto = ", ".join(f'"{kind}": "evil.Evil"' for kind in kinds)
    config = (folder / "config.json").read_text().replace('"modernbert"', '"unheard-of"', 1)
    (folder / "config.json").write_text(config.replace("{", '{"auto_map": {' + auto + "},", 1))
    reseal(folder)
    if not listed:
        rewrite(folder, lambda content: content["files"].pop([f["path"] for f in content["files"]].index("evil.py")))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    message = refused(folder, DamagedArtifact)
    assert ("expected model_type 'modernbert'" if listed else "evil.py: a file that is not listed") in message
    assert not proof.exists()


def test_pickles_are_not_read(copied: Any) -> None:
    import torch

    folder = copied("transformers")
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": torch.ones(1)}, folder / "pytorch_model.bin")
    assert "model.safetensors: missing" in refused(folder, DamagedArtifact)
    reseal(folder)
    assert "the entry 'model.safetensors' is not among its files" in refused(folder, DamagedArtifact)
    rewrite(folder, lambda content: content.update(entry="pytorch_model.bin"))
    assert "the engine can't load it" in refused(folder)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_are_all_there(copied: Any, change: str) -> None:
    """transformers would fill what is missing with random numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = copied("transformers")
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["head.dense.weight"]
    elif change == "unknown":
        tensors["head.dense.bias"] = torch.zeros(128)
    else:
        tensors["head.dense.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reseal(folder)
    assert "head.dense" in refused(folder)


_SERVED = """
import sys
from ettin.runtimes import load
with load(sys.argv[1], threads=1) as runtime:
    first = runtime.predict(("red planet", "Mars"))
    print("loaded", flush=True)
    sys.stdin.readline()
    again = runtime.predict(("red planet", "Mars"))
    long = runtime.predict(("red planet", "Mars is red. " * 300))
    print(first == again, float(long), flush=True)
"""


@pytest.mark.parametrize("variant", [("openvino", "int8"), ("openvino", "fp32"), ("onnx", "fp32"),
                                     ("transformers", "fp32")], ids="-".join)  # fmt: skip
def test_truncated_while_it_is_served(copied: Any, demo_artifacts: Artifacts, variant: tuple[str, str]) -> None:
    """`cp` over a served artifact truncates its files first: the process must not notice, and score as before."""
    folder = copied(*variant)
    with subprocess.Popen(
        [sys.executable, "-c", _SERVED, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "loaded\n"
        for path in folder.rglob("*"):
            if path.is_file():
                os.truncate(path, 0)
        said, _ = child.communicate("\n", timeout=CHILD_TIMEOUT_S)
    assert child.returncode == 0, f"ended with {child.returncode}"
    same, long = said.split()
    with load(demo_artifacts[variant], threads=1) as runtime:
        expected = float(runtime.predict(("red planet", "Mars is red. " * 300)))
    assert same == "True" and float(long) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["../up", "/etc/x", "a/b", ".hidden", "-rf", "", "a\\b", "x" * 300, "a\x1b[2Jb", "a\nb"]
)
def test_a_name_is_not_a_path(copied: Any, name: str) -> None:
    folder = copied("openvino")
    rewrite(folder, lambda content: content.update(name=name))
    assert "field 'name'" in refused(folder, ManifestError, cache_dir=folder.parent / "cache" / "deep")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["artifact"]


def test_packing_writes_where_the_user_is(
    demo_artifacts: Artifacts, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from ettin.runtimes.commands import pack
    from ettin.runtimes.commands.pack import command

    monkeypatch.setattr(pack, "_run", lambda *_: None)
    folder = copied("onnx")
    rewrite(folder, lambda content: content.update(name="../stolen"))
    (folder.parent / "here").mkdir()
    monkeypatch.chdir(folder.parent / "here")
    done = CliRunner().invoke(command, [str(folder)])
    assert isinstance(done.exception, ManifestError)
    assert sorted(path.name for path in folder.parent.rglob("*.tar.gz")) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(command="ettin-export \x1b]0;owned\x07"),
        lambda content: content["source"].update(id="a\x1b[31m"),
        lambda content: content["parity"].update(rule="fine\nerror: all is lost"),
        lambda content: content.update({"\x1b[2J": 1}),
        lambda content: content["files"][0].update(path="\x1b[2J"),
        lambda content: content["files"][0].update(path="a\u202eb"),
        lambda content: content["needs"].update(package="os.path"),
        lambda content: content.update(target="../x"),
        lambda content: content.update(precision="fp32\r"),
        lambda content: content["files"].append(content["files"][0]),
        lambda content: content["files"][0].update(path="x" * 5000),
        lambda content: content["files"][0].update(path="/".join(["x"] * 5000)),
        lambda content: content["source"]["shape"].update(deep=nested(40)),
    ],
)
def test_strings_of_a_manifest(copied: Any, change: Any) -> None:
    folder = copied("openvino")
    rewrite(folder, change)
    assert "manifest.json" in refused(folder, ManifestError)


@pytest.mark.parametrize("what", ["folder", "fifo", "device", "large", "nested", "objects", "link"])
def test_what_is_no_manifest(copied: Any, what: str) -> None:
    folder = copied("openvino")
    path = folder / "manifest.json"
    content = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only root makes devices")
    elif what == "large":
        path.write_bytes(content + b" " * (100 << 20))
    elif what == "nested":
        path.write_text("[" * 100_000 + "]" * 100_000)
    elif what == "objects":
        path.write_text('{"a":' * 500 + "1" + "}" * 500)
    else:
        (folder.parent / "other.json").write_bytes(content)
        path.symlink_to(folder.parent / "other.json")
    assert "not a manifest" in refused(folder, ManifestError)


def test_links_are_refused(copied: Any) -> None:
    folder = copied("openvino")
    (folder / "openvino").rename(folder.parent / "elsewhere")
    (folder / "openvino").symlink_to(folder.parent / "elsewhere")
    assert "a link" in refused(folder, DamagedArtifact)
    (folder / "openvino").unlink()
    (folder.parent / "elsewhere").rename(folder / "openvino")
    (folder / "parity.jsonl").rename(folder / "other.jsonl")
    (folder / "parity.jsonl").symlink_to("other.jsonl")
    assert "parity.jsonl: can't be read (a link)" in refused(folder, DamagedArtifact)
    (folder / "parity.jsonl").unlink()
    (folder / "other.jsonl").rename(folder / "parity.jsonl")
    (folder / "secret").symlink_to("/etc/hostname")
    assert "secret: a link that is not listed" in refused(folder, DamagedArtifact)


def test_the_way_to_an_artifact_may_be_a_link(copied: Any) -> None:
    folder = copied("openvino")
    current = folder.parent / "current"
    current.symlink_to("artifact")
    assert np.array_equal(scores(current), scores(folder))


def as_hub_snapshot(artifact: Path, cache: Path, below: str = "") -> Path:
    """The artifact as the hub's client keeps it: a folder of links into `blobs`."""
    import hashlib

    repository = cache / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    top = repository / "snapshots" / "0123456789abcdef"
    for source in (path for path in artifact.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        shutil.copyfile(source, blob)
        link = top / below / source.relative_to(artifact)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return top / below


@pytest.mark.parametrize("below", ["", "openvino-fp32"])
def test_a_snapshot_of_the_hub_loads(demo_artifacts: Artifacts, tmp_path: Path, below: str) -> None:
    snapshot = as_hub_snapshot(demo_artifacts["openvino", "fp32"], tmp_path, below)
    assert np.array_equal(scores(snapshot), scores(demo_artifacts["openvino", "fp32"]))
    listed = snapshot / "parity.jsonl"
    content = listed.read_bytes()
    listed.unlink()
    (tmp_path / "blobs").mkdir()
    hidden = tmp_path / "blobs" / ("0" * 64)
    hidden.write_bytes(content)
    for target in (hidden, Path(os.path.relpath(hidden, listed.parent)), Path("other.jsonl")):
        listed.symlink_to(target)
        assert "parity.jsonl: can't be read (a link)" in refused(snapshot, DamagedArtifact)
        listed.unlink()
    blob = snapshot.parents[1 + bool(below)] / "blobs" / ("1" * 64)
    blob.symlink_to(hidden)  # from there it would go anywhere
    listed.symlink_to(os.path.relpath(blob, listed.parent))
    assert "parity.jsonl: can't be read (a link)" in refused(snapshot, DamagedArtifact)
    blob.unlink()
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)  # what newer clients of the hub keep for several repositories
    shared.parent.mkdir()
    shared.write_bytes(content)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert np.array_equal(scores(snapshot), scores(demo_artifacts["openvino", "fp32"]))
    for other in (shared, Path(os.path.relpath(hidden, blob.parent)), Path("../../blobs/ab/../" + "0" * 64)):
        blob.unlink()
        blob.symlink_to(other)
        assert "parity.jsonl: can't be read (a link)" in refused(snapshot, DamagedArtifact)
    blob.unlink()
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    shared.unlink()
    shared.symlink_to(hidden)
    assert "parity.jsonl: can't be read (not a plain file)" in refused(snapshot, DamagedArtifact)


def test_copies_of_a_snapshot_are_plain_files(
    demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    from click.testing import CliRunner

    from ettin.runtimes.commands import pack
    from ettin.runtimes.commands.pack import command
    from ettin.runtimes.triton.repository import TritonOptions, publish

    pytest.importorskip("tritonclient.grpc.model_config_pb2", reason='needs pip install "ettin-export[triton]"')
    snapshot = as_hub_snapshot(demo_artifacts["onnx", "fp32"], tmp_path)
    publish(snapshot, tmp_path / "models", "reranker", TritonOptions())
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_symlink()]
    assert np.array_equal(scores(tmp_path / "models/reranker/1/artifact"), scores(snapshot))
    monkeypatch.setattr(pack, "_run", lambda words, *_: Path(words[words.index("-w") + 1]).mkdir())
    archive = tmp_path / "packed.tar.gz"
    done = CliRunner().invoke(command, [str(snapshot), "--output", str(archive)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with tarfile.open(archive) as tar:
        assert all(entry.isfile() or entry.isdir() for entry in tar.getmembers())
        tar.extractall(tmp_path, filter="data")
    assert np.array_equal(scores(tmp_path / "packed/artifact"), scores(snapshot))


@pytest.mark.parametrize(
    "name",
    [
        "evil.py", "pytorch_model.bin", "onnx/model.onnx_data", "onnx/deep/file", ".DS_Store", ".git/config",
        ".cache/other/x", ".cache/huggingface.py", "\x1b[2J", "manifest.json.bak",
    ],
)  # fmt: skip
def test_what_is_not_listed_is_refused(copied: Any, name: str) -> None:
    folder = copied("onnx")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert "that is not listed in manifest.json" in refused(folder, DamagedArtifact)
    assert "that is not listed in manifest.json" in refused(folder, DamagedArtifact, checksums=False)


def test_what_the_hubs_client_leaves_is_ignored(copied: Any, demo_artifacts: Artifacts) -> None:
    folder = copied("onnx")
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/x.metadata").write_text("x")
    (folder / ".gitattributes").write_text("x")
    (folder / "manifest.json.new").write_text("what a killed ettin-verify left")
    assert np.array_equal(scores(folder), scores(demo_artifacts["onnx", "fp32"]))


def test_external_data(copied: Any, demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    folder = copied("onnx")
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    path.unlink()
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=1024)
    data = path.with_name("model.onnx_data")
    assert data.stat().st_size > 1 << 20
    reseal(folder)
    assert np.array_equal(scores(folder), scores(demo_artifacts["onnx", "fp32"]))
    # A graph that names a file of the current folder does not get it.
    away = folder.parent / "away"
    away.mkdir()
    data.rename(away / data.name)
    reseal(folder)
    monkeypatch.chdir(away)
    assert "the engine can't load it" in refused(folder)


@pytest.mark.parametrize("target", ["onnx", "openvino", "transformers"])
@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 4096])
def test_what_an_engine_can_not_load(copied: Any, target: str, content: bytes) -> None:
    folder = copied(target)
    patterns = {"onnx": "onnx/*.onnx", "openvino": "openvino/*.xml", "transformers": "model.safetensors"}
    for path in folder.glob(patterns[target]):
        path.write_bytes(content)
    reseal(folder)
    assert "Export again" in refused(folder)


def test_ids_are_rows_of_the_model(copied: Any) -> None:
    folder = copied("openvino")
    rewrite(folder, lambda content: content["tokenizer"].update(pad_token_id=10_000_000))
    assert "token ids up to 10000000" in refused(folder, DamagedArtifact)
    rewrite(folder, lambda content: content["tokenizer"].update(pad_token_id=1, sha256="0" * 64))
    assert "is not the manifest's tokenizer" in refused(folder, DamagedArtifact)


def test_compiled_models_outlive_a_rewritten_manifest(copied: Any) -> None:
    folder = copied("openvino", "int8")
    cache = folder.parent / "cache"
    expected = scores(folder, cache_dir=cache)
    before = sorted(path.relative_to(cache) for path in cache.rglob("*.blob"))
    rewrite(folder, lambda content: content.update(created="another day"))
    assert np.array_equal(scores(folder, cache_dir=cache), expected)
    assert sorted(path.relative_to(cache) for path in cache.rglob("*.blob")) == before and before


@pytest.mark.parametrize("target", ["onnx", "openvino", "transformers"])
def test_replaced_between_check_and_use(copied: Any, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ettin.artifacts.opened import OpenArtifact

    folder = copied(target)
    name = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.bin"}.get(target, "model.safetensors")
    original = OpenArtifact.check

    def check(self: OpenArtifact) -> None:
        original(self)
        content = bytearray((folder / name).read_bytes())
        content[-1000:] = bytes(1000)
        (folder / name).with_suffix(".new").write_bytes(content)
        (folder / name).with_suffix(".new").replace(folder / name)

    monkeypatch.setattr(OpenArtifact, "check", check)
    assert f"{name}: sha256 differs" in refused(folder, DamagedArtifact)


def test_a_replaced_artifact_is_not_marked_as_verified(copied: Any, demo_artifacts: Artifacts) -> None:
    from ettin.runtimes.verify import record_verified, verify

    folder = copied("onnx")
    found = verify(folder)
    rewrite(folder, lambda content: content.update(created="another day"))
    with pytest.raises(ArtifactError, match="was replaced while it was verified"):
        record_verified(folder, found)


@pytest.mark.parametrize("variant", [("onnx", "int8"), ("openvino", "fp32"), ("transformers", "fp32")], ids="-".join)
def test_random_mutations(demo_artifacts: Artifacts, tmp_path: Path, variant: tuple[str, str]) -> None:
    """Each loads with the same scores or ends in one line; in a child, which would die or hang alone."""
    done = subprocess.run(
        [sys.executable, campaign_damage.__file__, demo_artifacts[variant], tmp_path, "--mutations", "60"],
        capture_output=True, text=True, check=False, timeout=CHILD_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode != -signal.SIGALRM, "hangs"
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["sealed"] + counts["unsealed"] == counts.get("loaded", 0) + counts["refused"] == 60


def test_errors_are_one_printable_line() -> None:
    text = str(EttinError("a\x1b[31m\nb\u202e" + "c" * 10_000))
    assert text.isprintable() and text.startswith("a\\x1b[31m\\nb\\u202ec") and len(text) < 4100
    assert re.search("…$", text)
