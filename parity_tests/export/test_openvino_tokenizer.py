"""The tokenizer beside an `openvino` model, which OpenVINO GenAI runs."""

from pathlib import Path

import numpy as np
import openvino as ov
import openvino_tokenizers
import pytest
from openvino_tokenizers import convert_tokenizer

from ettin.artifacts.parity import read_parity
from ettin.artifacts.targets import target_named
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.targets.to_openvino import OpenVinoWriter
from ettin.export.writer import Lowered, rewrite


def ids(model: ov.CompiledModel, query: str, document: str) -> list[int]:
    return model([np.array([query]), np.array([document])])["input_ids"][0].tolist()


def written(demo: Checkpoint, folder: Path, max_length_tokens: int | None = None) -> Lowered:
    return OpenVinoWriter(target_named("openvino")).lower(rewrite(demo, max_length_tokens), "fp32", folder)


def test_gives_our_ids(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    folder = demo_artifacts["openvino", "int8"]
    tokenizer = ov.Core().compile_model(folder / "openvino" / "openvino_tokenizer.xml", "CPU")
    for case in read_parity(folder):
        if case.max_length == 7999 and case.query + case.document:
            assert ids(tokenizer, case.query, case.document) == case.ids
    # OpenVINO Tokenizers 2026.4.1: a batch without any text fails (docs/export.md says so).
    with pytest.raises(RuntimeError, match="cannot be broadcasted"):
        ids(tokenizer, "", "")


def test_truncates_to_the_artifacts_length(demo: Checkpoint, tmp_path: Path) -> None:
    assert written(demo, tmp_path, 60).notes == ()
    tokenizer = ov.Core().compile_model(tmp_path / "openvino" / "openvino_tokenizer.xml", "CPU")
    assert len(ids(tokenizer, "red planet", "Mars " * 100)) == 60


def test_one_that_differs_is_left_out_and_said(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_special_tokens(tokenizer: object, **options: object) -> ov.Model:
        return convert_tokenizer(tokenizer, **{**options, "add_special_tokens": False})

    monkeypatch.setattr(openvino_tokenizers, "convert_tokenizer", without_special_tokens)
    (note,) = written(demo, tmp_path).notes
    assert note.startswith("OpenVINO GenAI can't open this artifact: its tokenizer gives other ids")
    assert not list(tmp_path.rglob("openvino_tokenizer*"))


def test_one_that_cannot_be_converted_is_said(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> ov.Model:
        raise NotImplementedError("Unigram")

    monkeypatch.setattr(openvino_tokenizers, "convert_tokenizer", refuse)
    (note,) = written(demo, tmp_path).notes
    assert "can't convert the tokenizer (NotImplementedError: Unigram)" in note
