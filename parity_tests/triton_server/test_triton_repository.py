"""Model repositories of Triton: what is written, and what never is."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import reseal

from ettin.artifacts.errors import DamagedArtifact, OutputError, UsageError
from ettin.artifacts.manifest import MANIFEST_NAME, Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes.commands.triton import command
from ettin.runtimes.triton.repository import TritonOptions, publish

pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason='needs pip install "ettin-export[triton]"')
Artifacts = dict[tuple[str, str], Path]


def config(folder: Path) -> "pb.ModelConfig":
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_hosted_model(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact, repository = demo_artifacts["openvino", "int8"], tmp_path / "models"
    options = TritonOptions(runtime={"threads": "2"}, environment="/opt/ettin", response_cache=True)
    assert publish(artifact, repository, "reranker", options) == 1
    model = repository / "reranker"
    inside = {f"1/artifact/{name}" for name in files(artifact) if name != "README.md"}
    assert files(model) == inside | {"config.pbtxt", "1/model.py", "warmup/query", "warmup/documents"}
    front = config(model)
    assert front.name == "reranker" and front.backend == "python" and front.max_batch_size > 1
    assert [(tensor.name, list(tensor.dims)) for tensor in front.input] == [("query", [1]), ("documents", [-1])]
    assert front.input[1].allow_ragged_batch and front.dynamic_batching.default_queue_policy.max_queue_size == 1024
    assert {key: value.string_value for key, value in front.parameters.items()} == {
        "threads": "2",
        "EXECUTION_ENV_PATH": "/opt/ettin",
    }
    assert front.response_cache.enable
    content = (model / "warmup" / "query").read_bytes()
    assert struct.unpack("<I", content[:4])[0] == len(content) - 4
    assert [path.name for path in tmp_path.iterdir()] == ["models"] and list(repository.iterdir()) == [model]


def test_next_version_leaves_the_one_before(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    first, second = demo_artifacts["onnx", "fp32"], demo_artifacts["onnx", "fp16"]
    publish(first, tmp_path / "models", "reranker", TritonOptions())
    before = {name: (tmp_path / "models/reranker" / name).read_bytes() for name in files(tmp_path / "models/reranker/1")
              if (tmp_path / "models/reranker" / name).exists()}  # fmt: skip
    assert publish(second, tmp_path / "models", "reranker", TritonOptions()) == 2
    model = tmp_path / "models" / "reranker"
    assert sorted(path.name for path in model.iterdir()) == ["1", "2", "config.pbtxt", "warmup"]
    assert Manifest.read(model / "1" / "artifact").precision == "fp32"
    assert Manifest.read(model / "2" / "artifact").precision == "fp16"
    assert all((model / name).read_bytes() == content for name, content in before.items())
    shutil.rmtree(model / "1")
    assert publish(first, tmp_path / "models", "reranker", TritonOptions()) == 3


def test_warm_up_files_of_another_kind_are_added(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    """A native front has none: Triton would not load the next version, whose configuration names some."""
    artifact = demo_artifacts["onnx", "fp32"]
    publish(artifact, tmp_path, "reranker", TritonOptions(native=True))
    publish(artifact, tmp_path, "reranker", TritonOptions())
    model = tmp_path / "reranker"
    (sample,) = config(model).model_warmup
    assert all((model / "warmup" / tensor.input_data_file).is_file() for tensor in sample.inputs.values())


def test_nothing_half_written_stays(demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = demo_artifacts["onnx", "fp32"]
    repository = tmp_path / "models"
    publish(artifact, repository, "reranker", TritonOptions())
    before = files(repository)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OpenArtifact, "copy_all", full)
    for name in ("reranker", "another"):
        with pytest.raises(OutputError, match="No space left on device.*Nothing was published"):
            publish(artifact, repository, name, TritonOptions())
    assert files(repository) == before and [path.name for path in tmp_path.iterdir()] == ["models"]


def test_something_else_is_left_alone(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["onnx", "fp32"]
    (tmp_path / "models" / "reranker").mkdir(parents=True)
    (tmp_path / "models" / "reranker" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a model of Triton's, left as it is"):
        publish(artifact, tmp_path / "models", "reranker", TritonOptions())
    assert files(tmp_path) == {"models/reranker/notes.txt"}


def test_native_onnx(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["onnx", "fp16"]
    options = TritonOptions(native=True, on_gpu=True, instances=2)
    assert publish(artifact, tmp_path, "reranker", options) == 1
    assert files(tmp_path / "reranker-engine") == {
        "config.pbtxt", "1/model_fp16.onnx", "warmup/input_ids", "warmup/attention_mask",
    }  # fmt: skip
    assert files(tmp_path / "reranker" / "1") == {"model.py", f"artifact/{MANIFEST_NAME}", "artifact/tokenizer.json"}
    engine = config(tmp_path / "reranker-engine")
    assert engine.backend == "onnxruntime" and engine.max_batch_size == 0
    assert engine.instance_group[0].count == 2 and engine.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in engine.input] == [
        ("input_ids", pb.TYPE_INT64, [-1, -1]),
        ("attention_mask", pb.TYPE_INT64, [-1, -1]),
    ]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in engine.output] == [
        ("logits", pb.TYPE_FP32, [-1, 1])
    ]
    assert config(tmp_path / "reranker").parameters["engine"].string_value == "reranker-engine"


def test_native_onnx_with_weights_of_its_own(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(demo_artifacts["onnx", "fp32"], artifact)
    (artifact / "onnx" / "model.onnx_data").write_bytes(b"weights")
    reseal(artifact)
    publish(artifact, tmp_path / "models", "reranker", TritonOptions(native=True))
    assert files(tmp_path / "models" / "reranker-engine" / "1") == {"model.onnx", "model.onnx_data"}


def test_native_openvino(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["openvino", "bf16"]
    publish(artifact, tmp_path, "reranker", TritonOptions(native=True))
    assert files(tmp_path / "reranker-engine") == {
        "config.pbtxt", "1/openvino_model.xml", "1/openvino_model.bin", "warmup/input_ids", "warmup/attention_mask",
    }  # fmt: skip
    assert config(tmp_path / "reranker-engine").parameters["HINT_BF16"].string_value == "YES"
    with pytest.raises(UsageError, match="can't be told to compute in f32"):
        publish(demo_artifacts["openvino", "fp32"], tmp_path, "other",
            TritonOptions(native=True),
        )  # fmt: skip


def test_another_device_is_not_replaced(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    options = TritonOptions(native=True, on_gpu=True, runtime={"device": "trt-rtx"})
    with pytest.raises(UsageError, match="own backends run on cpu and cuda, not on 'trt-rtx'. Leave out --native"):
        publish(demo_artifacts["onnx", "fp32"], tmp_path / "models", "reranker", options)
    assert not (tmp_path / "models").exists()


def test_torch_stays_outside(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = demo_artifacts["transformers", "fp32"]
    with pytest.raises(UsageError, match="'transformers' needs torch, which has no place in a server"):
        publish(artifact, tmp_path / "models", "reranker", TritonOptions())
    assert list(tmp_path.iterdir()) == []


def test_command(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    artifact, repository = demo_artifacts["onnx", "int8"], tmp_path / "models"
    done = CliRunner().invoke(command, [str(artifact), "--repository", str(repository), "--streams", "1"])
    assert done.exit_code == 0, done.output
    name = "ettin-reranker-demo-onnx-int8"
    assert done.stdout.strip() == str(repository / name / "1")
    assert config(repository / name).parameters["streams"].string_value == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: name an ARTIFACT, or --serve"),
        (["--serve", "--address", "::1"], "--address is '::1', expected an IPv4 address without a port, such as"),
        (["--serve", "--address", "[::1]:8001"], "--address is '[::1]:8001', expected an IPv4 address without a port"),
        (["--serve", "--address", "localhost"], "--address is 'localhost', expected an IPv4 address"),
        (["--serve", "--address", "127.0.0.1:8001"], "127.0.0.1 or 0.0.0.0: tritonserver serves HTTP on no other. Por"),
        (["{artifact}", "{artifact}", "--name", "one"], "--name is for one artifact, 2 are named"),
        (["{artifact}", "--instances", "2"], "--instances is for --native"),
        (["{artifact}", "--native", "--threads", "2"], "--threads and --streams are for our runtime"),
        (["{artifact}", "--max-length", "99999"], "max_length is 99999, expected 3 to 7999 tokens"),
        (["{artifact}", "--native", "--max-length", "99999"], "max_length is 99999, expected 3 to 7999 tokens"),
        (["{artifact}", "--name", "../up"], "model name '../up': expected letters"),
        (["nowhere"], "nowhere: no such folder"),
        (["{artifact}", "--device", "tpu"], "'onnx' does not run on device 'tpu', expected one of: cpu, cuda"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], message: str, demo_artifacts: Artifacts, tmp_path: Path
) -> None:
    named = [argument.format(artifact=demo_artifacts["onnx", "fp32"]) for argument in arguments]
    done = CliRunner().invoke(command, [*named, "--repository", str(tmp_path / "models")])
    assert message in str(done.exception) and not (tmp_path / "models").exists()


def test_damaged_artifact_is_not_published(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    shutil.copytree(demo_artifacts["onnx", "fp32"], tmp_path / "artifact")
    manifest = json.loads((tmp_path / "artifact" / MANIFEST_NAME).read_text())
    (tmp_path / "artifact" / manifest["entry"]).write_bytes(b"damaged")
    done = CliRunner().invoke(command, [str(tmp_path / "artifact"), "--repository", str(tmp_path / "models")])
    assert isinstance(done.exception, DamagedArtifact) and not (tmp_path / "models").exists()
