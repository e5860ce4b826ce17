"""`ettin-gpu` from end to end, on a CPU with a small shape and a stand-in for the kernel."""

import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import VARIANTS, shared_path

from ettin.artifacts.errors import EttinError, HardwareError, OutputError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.metrics import score_error
from ettin.artifacts.tolerances import FP32, INT8_SPEARMAN, REDUCED_RATIO
from ettin.export.pipeline import Export, Job, Options
from ettin.export.proof_pairs import natural_pairs
from ettin.export.source.checkpoint import read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.gpu.visit import bundle
from ettin.gpu.visit.cli import command
from ettin.gpu.visit.models import opened_model, our_predict, our_score, packed_predict, stock_predict
from ettin.gpu.visit.parts import PARTS
from ettin.gpu.visit.plan import paths
from ettin.gpu.visit.settings import SETTINGS
from ettin.runtimes import Batch, load

GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("fa2-*.json"))
PAIRS = [("What is the red planet?", "Mars is called the red planet."), ("Who?", "Nobody knows " * 40)] * 8
TRIAL = ["--device", "cpu", "--size", "tiny", "--minutes", "90"]  # no test depends on the time
# As on a machine with torch and transformers alone: neither this project nor what only it needs. Every process of the
# visit imports it, because the bundle's folder is in PYTHONPATH.
BARE = """
import importlib.metadata as metadata, sys
from importlib.machinery import PathFinder
from pathlib import Path
folder, needed = str(Path(__file__).parent), {needed}
class OnlyBundled:
    def find_spec(self, name, path=None, target=None):
        if name in needed:
            spec = PathFinder.find_spec(name, [folder])
            if spec is None:
                raise ModuleNotFoundError("not in the bundle: " + name, name=name)
            return spec
sys.meta_path = [OnlyBundled(), *(each for each in sys.meta_path if "editable" not in repr(each).lower())]
sys.path = [each for each in sys.path if "editable" not in each]
for name in ("sentence_transformers", "onnx", "onnxruntime", "openvino", "scipy", "matplotlib", "datasets"):
    sys.modules[name] = None
installed = metadata.MetadataPathFinder.find_distributions
metadata.MetadataPathFinder.find_distributions = lambda *context: (
    each for each in installed(*context) if "ettin" not in each._path.name or folder in str(each._path)
)
""".replace("{needed}", repr({name.replace("-", "_") for name in bundle._WHEELS}))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in makes many small steps, which several threads would wait for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def copy_installed(folder: Path, python: str) -> None:
    """Instead of what pip downloads."""
    assert python == "3.12"
    site = Path(sysconfig.get_path("purelib"))
    for name in bundle._WHEELS:
        for file in files(name) or ():
            if ".." not in file.parts:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes((site / file).read_bytes())


def write_pairs(file: Path) -> Path:
    file.write_text("".join(json.dumps({"query": query, "document": text}) + "\n" for query, text in PAIRS))
    return file


def test_bundle_measures_on_a_bare_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_artifacts: dict[tuple[str, str], Path]
) -> None:
    """All parts, with two settings: each takes a process of its own."""
    monkeypatch.setattr(bundle, "fetch_packages", copy_installed)
    folder, file, proven = tmp_path / "for-the-gpu", tmp_path / "result.json", tmp_path / "proven"
    shutil.copytree(demo_artifacts["transformers", "bf16"], proven / "transformers-bf16")
    words = ["--bundle", str(folder), "--data", str(write_pairs(tmp_path / "pairs.jsonl")), "--artifacts", str(proven)]
    assert CliRunner().invoke(command, words, catch_exceptions=False).stdout.strip() == str(folder)
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 1 << 20 < size_bytes < 50 << 20 and not list(folder.rglob("results"))
    settings = ["--setting", "bf16 FA2 unpadded", "--setting", "ours"]
    (folder / "sitecustomize.py").write_text(BARE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    program = [sys.executable, str(folder), *TRIAL, *settings, "--json", str(file)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    result = content["result"]
    assert result["data"] == "pairs.jsonl" and content["kind"] == "gpu-visit" and result["parity"]["pairs"] == 2
    assert content["machine"]["versions"]["torch"] and content["command"].startswith("ettin-gpu --device cpu")
    assert list(result["parts"]) == list(PARTS)
    for part in result["parts"].values():
        assert part["stopped"] is None and not part["failed"] and part["seconds"] >= 0, result["parts"]
    errors = result["parity"]["rows"]
    assert errors["packed graph, fp32"]["max_abs_error"] < 1e-4
    assert 0 < errors["ours"]["of_reference"] <= 1.5 and 0 < errors["packed graph, bf16"]["of_reference"] <= 1.5
    path = result["paths"]["transformers.cpu"]
    assert path["passed"] is True and path["mean_error_of_reference"] > 0
    assert path["artifacts"] == {"transformers-bf16": True} and "golden" not in result["parity"]
    rows = {row["name"]: row for row in result["speed"]["tiny"]["contestants"]}
    assert list(rows) == ["bf16 FA2 unpadded", "ours"]
    for row in rows.values():
        assert row.get("problem") is None and row["pairs_per_s"] > 0 and len(row["passes_s"]) == 3, row
    assert rows["ours"]["ratio"]["to"] == "bf16 FA2 unpadded" and rows["ours"]["batch"]["unit"] == "tokens"
    for name in rows:
        profiled = result["kernels"][f"tiny, {name}"]
        assert sum(row["share"] for row in profiled["rows"]) > 0.8 and "aten::mm" in str(profiled["rows"])
    assert all(each["kernel"] < 0.05 for each in result["attention"]["tiny, against the formula"].values())
    assert {row["window"] for row in result["attention"]["tiny"]} == {None, 64}
    assert "of FlashAttention-2's" in done.stdout and "tiny, pairs/s" in done.stdout


def test_a_part_that_fails_is_recorded_and_the_next_one_follows(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = [*TRIAL, "--part", "parity", "--part", "attention", "--checkpoint", str(tmp_path), "--json", str(file)]
    done = CliRunner().invoke(command, words)
    assert isinstance(done.exception, EttinError) and str(done.exception) == "1 of 2 parts failed: parity"
    result = json.loads(file.read_text())["result"]
    assert "modules.json" in result["parts"]["parity"]["stopped"] and result["parts"]["parity"]["traceback"]
    assert result["parts"]["attention"]["stopped"] is None and len(result["attention"]["tiny"]) == 4


def test_a_part_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = CliRunner().invoke(command, [*TRIAL, "--part", "parity", "--minutes", "0.001", "--json", str(file)])
    assert isinstance(done.exception, EttinError)
    assert json.loads(file.read_text())["result"]["parts"]["parity"]["stopped"] == "killed after 0 s"


def test_limits_fit_a_short_visit() -> None:
    assert sum(part.limit_s for part in PARTS.values()) <= 9 * 60


def test_a_path_passed_if_all_of_it_did() -> None:
    own = {"mean_abs_error": 1.0, "of_reference": 1.5, "mean_error_of_reference": 2 / 3}
    result: dict[str, Any] = {"device": "cuda", "parity": {"rows": {"ours": own}}}
    assert paths(result) == {"transformers.cuda": {"passed": True, **own}}
    for row in ({**own, "of_reference": 1.51}, {**own, "of_reference": float("nan")}, {"problem": "died"}):
        assert not paths({**result, "parity": {"rows": {"ours": row}}})["transformers.cuda"]["passed"]
    artifacts = {"a": {"target": "trt", "passed": True}, "b": {"problem": "tensorrt is not installed"}}
    assert paths({**result, "artifacts": artifacts})["trt"] == {"passed": True, "artifacts": {"a": True}}
    artifacts["c"] = {"target": "transformers", "passed": False}
    found = paths({**result, "artifacts": artifacts})
    assert not found["transformers.cuda"]["passed"] and found["trt"]["passed"]


@pytest.mark.hub
def test_packages_of_another_python(tmp_path: Path) -> None:
    bundle.fetch_packages(tmp_path, "3.12")
    assert list((tmp_path / "pydantic_core").glob("*cpython-312-x86_64-linux-gnu.so"))


def test_bundle_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "fetch_packages", lambda folder, python: None)
    monkeypatch.setattr(bundle, "_LIMIT_MIB", 1)
    with pytest.raises(OutputError, match="MiB, expected at most 1: name a smaller --checkpoint"):
        bundle.write_bundle(tmp_path / "folder", DEMO_FOLDER, PAIRS, DEMO_FOLDER)
    assert list(tmp_path.iterdir()) == []


def test_bad_input(tmp_path: Path) -> None:
    assert CliRunner().invoke(command, ["--size", "70m"]).exit_code == 2
    done = CliRunner().invoke(command, ["--setting", "fastest"])
    assert isinstance(done.exception, UsageError) and "expected one of: fp32 SDPA, bf16 FA2" in str(done.exception)
    if not torch.cuda.is_available():
        done = CliRunner().invoke(command, ["--size", "17m", "--json", str(tmp_path / "result.json")])
        assert isinstance(done.exception, HardwareError) and "torch finds none" in str(done.exception)


def test_settings_give_the_same_scores() -> None:
    """What is timed is what is right: the loop in fp32 with every attention, on pairs of many lengths."""
    pairs = [("a query", "word " * count) for count in (1, 90, 7, 40, 200, 3)]
    with opened_model(DEMO_FOLDER, "cpu") as model:
        scores = {
            attention: stock_predict(model, dtype=torch.float32, attention=attention)(pairs, 512, 4)
            for attention in ("sdpa", "flash-padded", "flash")
        }
        scores["packed"] = packed_predict(model, dtype=torch.float32)(pairs, 512, 4)
        bf16 = our_predict(model, ready=our_score)(pairs, 512, 300)
    assert scores["sdpa"].std() > 0.1
    for name in ("flash-padded", "flash", "packed"):
        np.testing.assert_allclose(scores[name], scores["sdpa"], atol=1e-4)
    np.testing.assert_allclose(bf16, scores["sdpa"], atol=0.2)
    assert {setting.unit for setting in SETTINGS.values()} == {"pairs", "tokens"}
    assert {setting.part for setting in SETTINGS.values() if setting.part} <= PARTS.keys()


# Every target against FlashAttention-2's own scores, recorded on a GPU by `ettin-gpu --golden`, on any machine.


def compare(artifact: Path, golden: Path) -> None:
    """Fails unless an artifact of the same weights is as near to FlashAttention-2 as its precision allows."""
    recorded = json.loads(golden.read_text())
    manifest = Manifest.read(artifact)
    assert recorded["result"]["weights_sha256"] == manifest.source.weights_sha256
    cases = recorded["result"]["cases"]
    fa2, fp32 = (np.array([case[key] for case in cases]) for key in ("fa2", "fp32"))
    sequences = [np.array(case["ids"], np.int32) for case in cases]
    with load(artifact) as runtime:
        starts = range(0, len(sequences), 16)
        batches = [Batch.of(sequences[start : start + 16], manifest.tokenizer.pad_token_id) for start in starts]
        scores = np.concatenate([runtime.score(batch) for batch in batches])
    error, own = score_error(scores, fa2), score_error(fp32, fa2)
    if manifest.precision == "int8":
        assert error.spearman is not None and error.spearman >= INT8_SPEARMAN
        return
    # What FlashAttention-2 in bf16 errs by, and what this precision may err by.
    ratio = REDUCED_RATIO.get(manifest.precision, 0.0)
    assert error.mean_abs <= (1 + ratio) * own.mean_abs + FP32, (error, own)


@pytest.fixture(scope="module")
def artifacts(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[tuple[str, str], Path]]:
    """Of every checkpoint that has a golden."""
    made = {"ettin-reranker-demo": demo_artifacts}
    for golden in GOLDENS:
        name = golden.stem.removeprefix("fa2-")
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            export = Export(read_checkpoint(shared_path(f"checkpoints/{name}")), Options())
            made[name] = {variant: root / "-".join(variant) for variant in VARIANTS}
            for (target, precision), folder in made[name].items():
                export.run(Job(target, precision, folder))
    return made


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_recorded_on_a_gpu(golden: Path, variant: tuple[str, str], artifacts: Any) -> None:
    compare(artifacts[golden.stem.removeprefix("fa2-")][variant], golden)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the kernel's stand-in makes of the same code on a CPU."""
    golden = tmp_path_factory.mktemp("golden") / "fa2-ettin-reranker-demo.json"
    pairs = golden.with_name("pairs.jsonl")
    lines = [json.dumps({"query": pair.query, "document": pair.document}) for pair in natural_pairs()[::4]]
    pairs.write_text("\n".join(lines))
    words = [*TRIAL, "--part", "parity", "--golden", str(golden), "--data", str(pairs)]
    assert CliRunner().invoke(command, words, catch_exceptions=False).exit_code == 0
    assert json.loads(golden.read_text())["kind"] == "fa2-golden"
    return golden


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_like_the_stand_in(
    stand_in: Path, variant: tuple[str, str], demo_artifacts: dict[tuple[str, str], Path]
) -> None:
    compare(demo_artifacts[variant], stand_in)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_other_scores_are_seen(
    stand_in: Path, variant: tuple[str, str], demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    content = json.loads(stand_in.read_text())
    for index, case in enumerate(content["result"]["cases"]):
        if index % 10 == 0:
            case["ids"] = case["ids"][::-1]
    changed = tmp_path / stand_in.name
    changed.write_text(json.dumps(content))
    with pytest.raises(AssertionError):
        compare(demo_artifacts[variant], changed)
