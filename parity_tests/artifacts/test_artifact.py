"""The artifact format: strict on read, whole or absent on write."""

import importlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support import reseal, rewrite

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import (
    ArtifactError,
    DamagedArtifact,
    EttinError,
    ManifestError,
    MissingDependency,
    NewerFormat,
    OutputError,
    ParityError,
    UnverifiedArtifact,
)
from ettin.artifacts.files import file_sha256, list_files
from ettin.artifacts.manifest import Graph, Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.parity import read_parity
from ettin.artifacts.targets import Target
from ettin.export import pipeline
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.proof_pairs import natural_pairs
from ettin.export.source.checkpoint import Checkpoint
from ettin.graph import GraphForm
from ettin.runtimes import load
from ettin.runtimes.verify import record_verified, verify, verify_in_child


@pytest.fixture
def artifact(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    shutil.copytree(demo_artifacts["openvino", "fp32"], folder)
    return folder


def test_manifest_survives_a_round_trip(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    assert manifest.to_bytes() == (artifact / "manifest.json").read_bytes()
    assert manifest.source.weights == "checkpoint" and manifest.source.shape["hidden_size"] == 128
    assert manifest.files == list_files(artifact)
    assert (manifest.target, manifest.precision, manifest.max_length_tokens) == ("openvino", "fp32", 7999)
    assert len(read_parity(artifact)) == manifest.parity.pairs >= 64


@pytest.mark.parametrize(
    "graph",
    [
        {
            "block_threshold_tokens": 512,
            "block_tokens": 64,
            "split_geglu": False,
            "rotate_blocks": True,
            "ragged": True,
        },
        {"block_threshold_tokens": 256, "block_tokens": 64, "split_geglu": True, "rotate_blocks": False},
        {"block_threshold_tokens": 256, "block_tokens": 64, "split_geglu": True, "rotate_blocks": False}
        | {"batch_tokens": 65536, "batch_pairs": 1024},
        {},
    ],
    ids=["openvino", "onnx", "trt", "transformers"],
)
def test_a_manifest_of_the_first_version_is_read_unchanged(tmp_path: Path, graph: dict[str, Any]) -> None:
    """The stored file was written when `graph` was any object and `arithmetic` held texts for users."""
    stored = (Path(__file__).parent / "manifest_v1.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(stored)
    manifest = Manifest.read(tmp_path)
    assert manifest.parity.arithmetic == (Arithmetic.BF16_OWN_ATTENTION, Arithmetic.BF16, Arithmetic.F32)
    assert manifest.graph.ragged and manifest.graph.block_threshold_tokens == 512
    rewrite(tmp_path, lambda content: content.update(graph=graph))
    manifest = Manifest.read(tmp_path)
    again, content = json.loads(manifest.to_bytes()), json.loads((tmp_path / "manifest.json").read_text())
    assert again["parity"].pop("arithmetic") == ["bf16-own-attention", "bf16", "f32"]
    assert content["parity"].pop("arithmetic") == ["bf16 (own attention kernel)", "bf16", "f32"]
    assert again.pop("manifest_sha256") != content.pop("manifest_sha256")
    assert again == content


def test_the_mark_of_an_experimental_target_is_optional(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    assert not manifest.experimental and "experimental" not in json.loads(manifest.to_bytes())
    marked = manifest.model_copy(update={"experimental": True})
    again = Manifest.from_bytes(marked.to_bytes(), artifact)
    assert again.experimental and again.format_version == 1 and again.digest == marked.digest != manifest.digest


def test_graph_defaults_are_those_of_the_scorer() -> None:
    assert Graph().model_dump(include=asdict(GraphForm()).keys()) == asdict(GraphForm())
    assert Graph.model_validate(asdict(GraphForm(rotate_blocks=True))).rotate_blocks


def test_format_page_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "artifacts" / "FORMAT.md").read_text()
    for name in Manifest.model_fields:
        assert f"`{name}" in page, name


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "link"])
@pytest.mark.parametrize("name", ["openvino/openvino_model.bin", "tokenizer.json", "parity.jsonl"])
def test_damaged_file(artifact: Path, name: str, damage: str) -> None:
    path = artifact / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "shorten":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    if damage == "link":
        path.symlink_to("/etc/hostname")
    with pytest.raises(DamagedArtifact) as error:
        load(artifact)
    assert name in str(error.value) and "Export again: ettin-export" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["edit", "remove", "link", "folder"])
def test_the_card_is_no_part_of_an_artifact(artifact: Path, change: str) -> None:
    card = artifact / "README.md"
    content = card.read_bytes()
    card.unlink()
    if change == "edit":
        card.write_bytes(b"---\nlicense: mit\n---\n" + content)
    elif change == "link":
        card.symlink_to("/etc/hostname")
    elif change == "folder":
        card.mkdir()
    with load(artifact) as runtime:
        assert runtime.predict(("a", "b")).shape == ()
    copy = artifact.with_name("copy")
    with OpenArtifact(artifact) as opened:
        opened.copy_all(copy)
    assert not (copy / "README.md").exists()


def test_an_early_artifact_lists_its_card(artifact: Path) -> None:
    card = artifact / "README.md"
    entry = {"path": "README.md", "size_bytes": card.stat().st_size, "sha256": file_sha256(card)}
    rewrite(artifact, lambda content: content["files"].append(entry))
    with load(artifact) as runtime:
        assert runtime.predict(("a", "b")).shape == ()
    card.write_bytes(card.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedArtifact, match="README.md: sha256 differs"):
        load(artifact)


def test_sizes_only(artifact: Path) -> None:
    path = artifact / "parity.jsonl"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with load(artifact, checksums=False) as runtime:
        assert runtime.predict(("a", "b")).shape == ()
    path.write_bytes(b"")
    with pytest.raises(DamagedArtifact):
        load(artifact, checksums=False)


def test_edited_manifest(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace('"max_length_tokens": 7999', '"max_length_tokens": 9999'))
    with pytest.raises(ManifestError, match="was edited"):
        load(artifact)


def test_newer_format(artifact: Path) -> None:
    rewrite(artifact, lambda content: content.update(format_version=3, something="new"))
    with pytest.raises(NewerFormat, match="format version 3, this ettin-export reads up to 2. Run: pip install -U"):
        load(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(extra=1), "field 'extra'"),
        (lambda content: content.pop("parity"), "field 'parity'"),
        (lambda content: content.update(max_length_tokens="512"), "field 'max_length_tokens'"),
        (lambda content: content.update(activation="softmax"), "field 'activation'"),
        (lambda content: content["source"].update(weights_sha256="x"), "field 'source.weights_sha256'"),
        (lambda content: content["files"][0].update(path="../../etc/passwd"), "not a plain path inside"),
        (lambda content: content["files"][0].update(path="/etc/passwd"), "not a plain path inside"),
        (lambda content: content["files"][0].update(path="a\\b"), "not a plain path inside"),
        (lambda content: content.update(entry="../model.xml"), "not a plain path inside"),
    ],
)
def test_manifest_is_read_strictly(artifact: Path, change: Any, message: str) -> None:
    rewrite(artifact, change)
    with pytest.raises(ManifestError) as error:
        load(artifact)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "7", '{"format_version": 1}', "\x00"])
def test_what_is_no_manifest(artifact: Path, content: str) -> None:
    (artifact / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        load(artifact)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="this is not an artifact. Make one: ettin-export"):
        load(tmp_path)
    with pytest.raises(ManifestError, match="missing: no such folder, and not a hub id"):
        load(tmp_path / "missing")


def test_entry_must_be_listed(artifact: Path) -> None:
    rewrite(artifact, lambda content: content.update(entry="elsewhere.xml"))
    with pytest.raises(DamagedArtifact, match="is not among its files"):
        load(artifact)


def test_unverified_is_refused_until_verified(artifact: Path) -> None:
    rewrite(artifact, lambda content: content["parity"].update(status="unverified", pairs=0))
    with pytest.raises(UnverifiedArtifact, match="Run here: ettin-verify"):
        load(artifact)
    found = verify(artifact)
    assert found.ok
    record_verified(artifact, found)
    with load(artifact) as runtime:
        assert runtime.manifest.parity.status == "verified"


def test_other_ids_fail_verification(artifact: Path) -> None:
    path = artifact / "parity.jsonl"
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    first["ids"][2] += 1
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    reseal(artifact)
    with pytest.raises(ParityError, match="token ids .* differ from the reference's at 2"):
        verify(artifact)
    with pytest.raises(ParityError, match="can't be verified: .*token ids"):
        verify_in_child(artifact)


def test_other_scores_fail_verification(artifact: Path) -> None:
    path = artifact / "parity.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["gold"] += 0.01
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reseal(artifact)
    found = verify(artifact)
    assert not found.ok and rows[5]["query"][:20] in found.worst_pair


def test_too_few_parity_pairs_fail(artifact: Path) -> None:
    path = artifact / "parity.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:63]))
    reseal(artifact)
    with pytest.raises(ParityError, match="63 parity pairs, expected at least 64"):
        verify(artifact)


def test_links_are_not_published(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(OutputError, match="plain files only"):
        list_files(tmp_path)


def test_missing_engine_is_one_line_and_a_broken_one_is_not_hidden(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'libsomething'", name="libsomething")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependency, match=r'Run: pip install "ettin-export\[openvino\]"'):
        load(artifact)
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="libsomething"):
        load(artifact)


def test_every_error_is_an_ettin_error() -> None:
    from ettin.artifacts import errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(kind, EttinError) for kind in kinds)
    for kind in kinds:
        assert kind.__name__ in (errors.__doc__ or ""), f"{kind.__name__} is missing from the tree"
    assert issubclass(DamagedArtifact, ArtifactError)


def test_export_without_its_engine(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused with the line that mends it; published only on the user's word, and then marked."""

    def absent(target: Target) -> Any:
        raise MissingDependency(f"target '{target.name}'", "onnxruntime", "onnx")

    with monkeypatch.context() as patch:
        patch.setattr(Target, "runtime_class", absent)
        patch.setattr(pipeline, "proof_pairs", lambda extra, ranking: natural_pairs()[:64])
        job = Job("onnx", "fp32", tmp_path / "artifact")
        for call in (
            lambda: Export(demo, Options()).check([job]),
            lambda: Export(demo, Options()).run(job),
        ):
            with pytest.raises(MissingDependency, match=r"ettin-export\[onnx\]"):
                call()
        assert list(tmp_path.iterdir()) == []
        assert Export(demo, Options(allow_unverified=True)).run(job) is None
    with pytest.raises(UnverifiedArtifact, match="Run here: ettin-verify"):
        load(job.output)
    assert "**Not verified.**" in (job.output / "README.md").read_text()
    record_verified(job.output, verify(job.output))
    load(job.output).close()
