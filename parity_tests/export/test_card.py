"""Cards: what the hub reads of them, what a person runs from them, and that text of a checkpoint stays text."""

import os
import re
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from ettin.artifacts.manifest import FileEntry, Manifest
from ettin.export.card import _metadata, card, code, collection_card
from ettin.export.source.sizes import DEMO_FOLDER

Artifacts = dict[tuple[str, str], Path]


@pytest.fixture
def manifest(demo_artifacts: Artifacts) -> Manifest:
    return Manifest.read(demo_artifacts["onnx", "fp32"])


def test_front_matter(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(card(manifest, DEMO_FOLDER))
    assert metadata_load(path) == {
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-ranking",
        "library_name": "transformers.js",
        "tags": ["cross-encoder", "reranker", "modernbert", "ettin-export", "onnx", "fp32"],
    }
    source = manifest.source.model_copy(update={"id": "cross-encoder/ettin-reranker-68m-v1", "revision": "d" * 40})
    path.write_text(card(manifest.model_copy(update={"source": source}), tmp_path / "none"))
    stated = metadata_load(path)
    assert stated["base_model"] == "cross-encoder/ettin-reranker-68m-v1" and "license" not in stated
    path.write_text(collection_card(manifest, ["onnx-fp32"], None, DEMO_FOLDER))
    assert metadata_load(path)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "stated",
    ["license: 'mit\\n---\\n# evil'", "license: [mit]", "license: {a: b}", "language: [1, '<b>', null]", "a: [", "- a",
     "license: !!python/object/apply:os.system [true]", "x" * (1 << 20)],
)  # fmt: skip
def test_metadata_of_a_checkpoint_is_not_trusted(manifest: Manifest, tmp_path: Path, stated: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{stated}\n---\n")
    text = card(manifest, tmp_path)
    assert not re.search(r"^(license|language):", text, re.MULTILINE) and "evil" not in text


def test_names_stay_text(manifest: Manifest) -> None:
    name = "a`` <img src=x onerror=alert(1)> [link](javascript:x) ` | b"
    source = manifest.source.model_copy(update={"id": name, "revision": name})
    text = card(manifest.model_copy(update={"name": name, "source": source}), DEMO_FOLDER)
    assert code(name) == f"``` {name} ```"
    assert text.count(name) == text.count(code(name)) == 3
    assert "base_model" not in text


def test_what_a_card_holds(demo_artifacts: Artifacts, manifest: Manifest) -> None:
    for (target, precision), folder in demo_artifacts.items():
        text = (folder / "README.md").read_text()
        assert "ettin-verify ." in text and "ettin-export --size demo --all" in text
        assert f"ettin-serve {target}-{precision}\n" in text and "| largest error (logits) | " in text
        assert ("drop of nDCG@10" in text) == (precision == "int8")
        assert ("### transformers.js" in text) == ("takes the softmax of one logit" in text) == (target == "onnx")
        assert ("### Triton" in text) == (target != "transformers")
        assert ("### OpenVINO GenAI" in text) == (folder / "openvino" / "openvino_tokenizer.xml").exists()
        assert "$" not in text
    tokenizer = FileEntry(path="openvino/openvino_tokenizer.xml", size_bytes=0, sha256="0" * 64)
    with_tokenizer = manifest.model_copy(update={"files": (*manifest.files, tokenizer)})
    assert "### OpenVINO GenAI" in card(with_tokenizer, DEMO_FOLDER)


def test_python_of_a_card_runs(demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo_artifacts["onnx", "fp32"]
    monkeypatch.chdir(folder.parent)
    block = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(block, names)  # noqa: S102 (a code block of ours)
    assert len(names["hits"]) == 1  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_metadata_comes_from_a_plain_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")  # who reads it waits for ever
    assert _metadata(tmp_path / "README.md") == {}
