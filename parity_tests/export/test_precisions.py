"""Several precisions in one artifact."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import DamagedArtifact, ManifestError, ParityError, UnverifiedArtifact, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.precisions import in_precision, precisions
from ettin.export import pipeline
from ettin.export.options import Job, Options
from ettin.export.pipeline import Export
from ettin.export.push import push
from ettin.export.source.checkpoint import Checkpoint
from ettin.runtimes import load
from ettin.runtimes.commands import calibrate, pack
from ettin.runtimes.loading import checked_manifest
from ettin.runtimes.triton.repository import TritonOptions, publish
from ettin.runtimes.verify import verify

PRECISIONS = ("fp16", "fp32", "int8")
OPTIONS = Options(max_length=600)
PAIRS = [("red planet", "Mars is red"), ("red planet", "bread " * 90), ("", "")]
Artifacts = dict[tuple[str, str], Path]


def jobs(folder: Path) -> list[Job]:
    return [Job("onnx", precision, folder) for precision in PRECISIONS]


@pytest.fixture(scope="module")
def made(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: the whole way in seconds."""
    folder = tmp_path_factory.mktemp("several") / "onnx"
    verifications = Export(tiny, OPTIONS).run_together(jobs(folder))
    assert [verification.runtime.rpartition(" ")[2] for verification in verifications] == list(PRECISIONS)
    return folder


@pytest.fixture
def several(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "several")


def rewrite(folder: Path, **changes: object) -> None:
    """A manifest with other fields, its checksum as it must be."""
    manifest = Manifest.read(folder)
    (folder / "manifest.json").write_bytes(manifest.model_copy(update=changes).to_bytes())


def test_holds_one_of_each(several: Path) -> None:
    files = {path.relative_to(several).as_posix() for path in several.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "config.json", "manifest.json", "onnx/model.onnx", "onnx/model_fp16.onnx",
        "onnx/model_quantized.onnx", "parity.jsonl", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    manifest = Manifest.read(several)
    assert manifest.format_version == 2 and precisions(manifest) == PRECISIONS
    assert [variant.needs.isa for variant in manifest.variants] == [(), ("vnni",)]
    assert [variant.calibration is None for variant in manifest.variants] == [True, False]
    assert len({in_precision(manifest, precision).digest for precision in PRECISIONS}) == 3
    card = (several / "README.md").read_text()
    assert all(f"### {precision}: `onnx/model" in card for precision in PRECISIONS)


@pytest.mark.usefixtures("verified_here")
def test_each_is_the_one_that_is_exported_alone(several: Path, tiny: Checkpoint, tmp_path: Path) -> None:
    export = Export(tiny, OPTIONS)
    export.prepare(jobs(tmp_path))
    for precision in PRECISIONS:
        export.run(Job("onnx", precision, tmp_path / precision))
        with load(several, precision=precision) as ours, load(tmp_path / precision) as alone:
            assert ours.manifest.full_name == alone.manifest.full_name
            np.testing.assert_array_equal(ours.predict(PAIRS), alone.predict(PAIRS))
            with pickle.loads(pickle.dumps(ours)) as again:  # noqa: S301
                assert again.manifest == ours.manifest
                np.testing.assert_array_equal(again.predict(PAIRS), ours.predict(PAIRS))
    with load(several) as first:
        assert first.manifest.precision == "fp16"


def test_a_precision_that_is_not_there(several: Path, demo_artifacts: Artifacts) -> None:
    with pytest.raises(UsageError, match="precision is 'bf16', expected one that .* has: fp16, fp32, int8"):
        load(several, precision="bf16")
    with pytest.raises(UsageError, match="expected one that ettin-reranker-demo-onnx has: fp32"):
        load(demo_artifacts["onnx", "fp32"], precision="int8")
    with load(demo_artifacts["onnx", "fp32"], precision="fp32") as runtime:
        assert runtime.manifest == Manifest.read(demo_artifacts["onnx", "fp32"])


def test_all_files_are_compared(several: Path) -> None:
    path = several / "onnx" / "model_quantized.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedArtifact, match=r"model_quantized\.onnx: sha256"):
        load(several, precision="fp32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda manifest: {"format_version": 1}, "format version 2 is for manifests with 'variants'"),
        (lambda manifest: {"variants": ()}, "format version 2 is for manifests with 'variants'"),
        (lambda manifest: {"variants": manifest.variants * 2}, "'variants' has a precision twice"),
        (lambda manifest: {"precision": "int8"}, "'variants' has a precision twice"),
    ],
)
def test_manifest_is_read_strictly(several: Path, changes: Callable[..., dict[str, object]], message: str) -> None:
    rewrite(several, **changes(Manifest.read(several)))
    with pytest.raises(ManifestError, match=message):
        load(several)


def test_a_variant_is_judged_like_an_artifact(several: Path) -> None:
    manifest = Manifest.read(several)
    first, int8 = manifest.variants
    for update, error, message in (
        ({"entry": "onnx/other.onnx"}, DamagedArtifact, "is not among its files"),
        ({"precision": "int4"}, UsageError, "target 'onnx' has no precision 'int4'"),
        ({"parity": int8.parity.model_copy(update={"status": "unverified"})}, UnverifiedArtifact, "without proof"),
    ):
        changed = int8.model_copy(update=update)
        rewrite(several, variants=(first, changed))
        with pytest.raises(error, match=message):
            load(several, precision=changed.precision)
        load(several, precision="fp32").close()


def test_verify_verifies_all_and_records_each(several: Path) -> None:
    command = [Path(sys.executable).with_name("ettin-verify"), several]
    one = subprocess.run([*command, "--precision", "int8"], capture_output=True, text=True, check=True)
    assert one.stdout.count("ok (") == 1 and ", int8:" in one.stdout
    before = Manifest.read(several)
    first, int8 = before.variants
    unproven = int8.parity.model_copy(update={"status": "unverified"})
    rewrite(several, variants=(first, int8.model_copy(update={"parity": unproven})))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("ok (") == 3 and done.stdout.count("marked as verified") == 1
    after = Manifest.read(several)
    assert after.variants[1].parity.status == "verified"
    assert after == before
    (several / "onnx" / "model.onnx").write_bytes((several / "onnx" / "model_fp16.onnx").read_bytes())
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "model.onnx" in refused.stderr


def test_wrong_scores_in_one_precision_fail(several: Path) -> None:
    """The files are what the manifest lists, but fp32 is the file of int8."""
    manifest = Manifest.read(several)
    first, int8 = manifest.variants
    rewrite(several, variants=(first.model_copy(update={"entry": int8.entry}), int8))
    assert not verify(several, precision="fp32").ok
    assert verify(several, precision="int8").ok


def test_one_that_fails_publishes_nothing(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses_fp16(folder: Path) -> object:
        if Manifest.read(folder).precision == "fp16":
            raise ParityError("no")
        return verify(folder)

    monkeypatch.setattr(pipeline, "verify_in_child", refuses_fp16)
    with pytest.raises(ParityError, match="no"):
        Export(tiny, OPTIONS).run_together(jobs(tmp_path / "onnx"))
    assert list(tmp_path.iterdir()) == []


def test_triton_serves_the_named_one(several: Path, tmp_path: Path) -> None:
    manifest = checked_manifest(several, precision="int8")
    assert manifest.full_name.endswith("-onnx-int8")
    native = TritonOptions(native=True, runtime={"precision": "int8"})
    publish(several, tmp_path / "models", "native", native)
    assert (tmp_path / "models" / "native-engine" / "1" / "model_quantized.onnx").is_file()
    assert len(list((tmp_path / "models" / "native-engine" / "1").iterdir())) == 1
    publish(several, tmp_path / "models", "hosted", TritonOptions(runtime={"precision": "int8"}))
    assert 'key: "precision"' in (tmp_path / "models" / "hosted" / "config.pbtxt").read_text()
    with OpenArtifact(tmp_path / "models" / "hosted" / "1" / "artifact", precision="int8") as artifact:
        artifact.check()
        artifact.check_contents()


@pytest.mark.usefixtures("verified_here")
def test_command_line(export_here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    refused = export_here("--size", "demo", "--target", "openvino", "--precision", "int8,fp32")
    assert refused.stderr.endswith("target 'openvino' has one precision, expected one of: int8,fp32\n")
    refused = export_here("--size", "demo", "--target", "onnx", "--precision", "int8,int8")
    assert refused.stderr.endswith("--precision int8,int8: names one twice\n")
    done = export_here("--size", "demo", "--target", "onnx", "--precision", "fp32,int4")
    assert "target 'onnx' has no precision 'int4'" in done.stderr
    plan = export_here("--size", "demo", "--target", "onnx", "--precision", "fp32,int8", "--dry-run")
    assert plan.stdout.count("to ettin-reranker-demo/onnx,") == 2
    done = export_here("--size", "demo", "--target", "onnx", "--precision", "fp32,fp16")
    assert done.returncode == 0 and done.stdout == "ettin-reranker-demo/onnx\n", done.stderr
    assert done.stderr.count("score 247 pairs with the reference") == 1
    assert json.loads((tmp_path / done.stdout.strip() / "manifest.json").read_text())["format_version"] == 2
    documents = tmp_path / "documents.txt"
    documents.write_text("Mars is the Red Planet.\nbread\n")
    rerank = [Path(sys.executable).with_name("ettin-rerank"), tmp_path / done.stdout.strip(), documents]
    ranked = subprocess.run(
        [*rerank, "--query", "red planet", "--precision", "fp16"], capture_output=True, text=True, check=True
    )
    assert "Mars" in ranked.stdout.splitlines()[1]


def test_calibration_keeps_all_precisions(several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit is stored beside all precisions, which stay as they were."""
    before, labels = Manifest.read(several), [number % 2 for number in range(60)]
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"query": "q", "document": f"d {label}", "label": label}) for label in labels)
    )
    drawn = np.random.default_rng(0).normal(labels).astype(np.float32)
    monkeypatch.setattr("ettin.runtimes.base.Runtime.predict", lambda *_, **__: drawn)
    done = CliRunner().invoke(calibrate.command, [str(several), str(tmp_path / "pairs.jsonl")])
    assert done.exit_code == 0, (done.output, done.exception)
    after = Manifest.read(several)
    assert after.score_calibration and after.model_copy(update={"score_calibration": None}) == before
    assert "fp32, int8" in done.output
    for precision in PRECISIONS:
        assert in_precision(after, precision).score_calibration == after.score_calibration


def test_all_precisions_must_be_proven_to_be_handed_on(several: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(several)
    rewrite(several, variants=(
        manifest.variants[0],
        manifest.variants[1].model_copy(update={"parity": manifest.parity.model_copy(update={"status": "unverified"})}),
    ))  # fmt: skip
    with load(several):
        pass  # the first is proven
    with pytest.raises(UnverifiedArtifact):
        push({"several": several}, "org/name", several)
    done = CliRunner().invoke(pack.command, [str(several), "--output", str(tmp_path / "a.tar.gz")])
    assert isinstance(done.exception, UnverifiedArtifact) and not (tmp_path / "a.tar.gz").exists()
