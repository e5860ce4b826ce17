"""Writes artifacts into a model repository of Triton Inference Server.

A repository is `NAME/config.pbtxt` and `NAME/VERSION/…`. A version appears whole (it is renamed into place) and is
never changed. Publishing again adds the next version, to which a server that polls, or is told to load, switches.
"""

import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ettin.artifacts.errors import MissingDependency, OutputError, UsageError
from ettin.artifacts.manifest import Manifest, TensorSpec
from ettin.artifacts.opened import TOKENIZER_NAME, OpenArtifact
from ettin.artifacts.publishing import NEW, workspace
from ettin.artifacts.targets import target_named
from ettin.artifacts.writing import sync, sync_tree
from ettin.runtimes.arguments import checked_length
from ettin.runtimes.loading import checked_device
from ettin.runtimes.serving.backends import WARMUP_DOCUMENTS, WARMUP_QUERY
from ettin.runtimes.triton import ARTIFACT

_ENGINE_SUFFIX = "-engine"
_MODEL = '''"""Written by ettin-triton: the code is in the installed package."""

from ettin.runtimes.triton.model import {implementation} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}
_WARMUP_TOKENS = 64
_ROWS = 64  # requests that are handed to the model at a time


@dataclass(frozen=True)
class TritonOptions:
    """How a model is served.

    Args:
        native: the engine runs in Triton's own backend; False: in the Python backend, in our runtime.
        on_gpu: whether Triton puts the engine on a GPU.
        instances: number of instances of a native engine; our runtime has its own streams.
        environment: virtual environment of the Python backend's models; None: that of the server's Python.
        response_cache: answer equal requests from Triton's cache (the server needs `--cache-config`).
        max_queued_requests: maximum number of requests in Triton's queue before it refuses more.
        runtime: arguments of `load`, as text.
        trusted_key: who must have signed the artifact, see `OpenArtifact`; None: it need not be signed.
    """

    native: bool = False
    on_gpu: bool = False
    instances: int = 1
    environment: str | None = None
    response_cache: bool = False
    max_queued_requests: int = 1024
    runtime: Mapping[str, str] = field(default_factory=dict)
    trusted_key: Path | None = None


def publish(artifact: Path, repository: Path, name: str, options: TritonOptions) -> int:
    """Adds an artifact to a repository: the files that its manifest lists, as it lists them.

    Args:
        artifact: its folder.
        repository: the model repository; made if it is not there.
        name: of the model.
        options: how it is served.

    Returns:
        The new version of the model.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: the target can't be served like this, or Triton can't use the name.
        OutputError: the repository can't be written, or has something else of that name.
        MissingDependency: tritonclient, which knows the form of the configuration, is not installed.
    """
    engine = name + _ENGINE_SUFFIX
    precision = options.runtime.get("precision")
    with OpenArtifact(artifact, trusted_key=options.trusted_key, precision=precision) as opened:
        opened.check()
        manifest = opened.manifest
        _check(manifest, options)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UsageError(f"model name '{name}': expected letters, digits, '.', '_' and '-'")
        folders = [repository / model for model in ([name, engine] if options.native else [name])]
        versions = [path.name for folder in folders for path in folder.glob("*") if path.is_dir()]
        version = 1 + max((int(number) for number in versions if number.isdigit()), default=0)
        if options.native:  # the engine first: the new front may ask for it at once
            with _staged(repository, engine, version) as stage:
                _copy_engine(opened, stage / str(version))
                _write_config(stage, _engine_config(stage, manifest, engine, options))
        with _staged(repository, name, version) as stage:
            _write_config(stage, _front_config(stage, name, manifest, options))
            implementation = "NativeModel" if options.native else "HostedModel"
            folder = stage / str(version)
            (folder / "model.py").write_text(_MODEL.format(implementation=implementation), encoding="utf-8")
            if options.native:
                opened.copy([TOKENIZER_NAME], folder / ARTIFACT)
                opened.copy_proof(folder / ARTIFACT)
            else:
                opened.copy_all(folder / ARTIFACT)
    return version


def _check(manifest: Manifest, options: TritonOptions) -> None:
    target, precision = target_named(manifest.target), manifest.precision
    checked_length(int(options.runtime.get("max_length", manifest.max_length_tokens)), manifest)
    if not target.triton_backends:
        raise UsageError(
            f"target '{target.name}' needs torch, which has no place in a server. Serve another: onnx, openvino, trt"
        )
    if options.native and target.native_triton_backend is None:
        raise UsageError(f"Triton has no backend of its own for target '{target.name}'. Leave out --native")
    device = checked_device(manifest, options.runtime.get("device"))
    if options.native and device not in ("cpu", "cuda"):
        raise UsageError(f"Triton's own backends run on cpu and cuda, not on '{device}'. Leave out --native")
    if options.native and (target.name, precision) == ("openvino", "fp32"):
        raise UsageError(
            "Triton's OpenVINO backend can't be told to compute in f32 where the CPU has bf16. Leave out --native"
        )


def _copy_engine(artifact: OpenArtifact, folder: Path) -> None:
    """Copies the files that Triton's own backend opens, without the folders above them."""
    entry = PurePosixPath(artifact.manifest.entry)
    names = [str(entry)]
    if artifact.manifest.engine is None:  # weights lie beside a graph, with its name and another ending
        paths = [PurePosixPath(file.path) for file in artifact.manifest.files]
        names = [str(path) for path in paths if path.parent == entry.parent and path.name.startswith(f"{entry.stem}.")]
    for name in names:
        artifact.copy_file(name, folder / PurePosixPath(name).name)


@contextmanager
def _staged(repository: Path, name: str, version: int) -> Iterator[Path]:
    """A folder that becomes the model, or its next version, when the block ends without an error."""
    model = repository / name
    if model.exists() and not (model / "config.pbtxt").is_file():
        raise OutputError(f"{model}: not a model of Triton's, left as it is. Choose another name: --name NAME")
    try:
        # Beside the repository: Triton takes every folder in it for a model.
        with workspace(repository) as scratch:
            repository.mkdir(exist_ok=True)
            stage = scratch / NEW
            (stage / str(version)).mkdir(parents=True)
            yield stage
            sync_tree(stage)
            _move_into_place(stage, model, version)
    except OSError as error:
        text = f"{model}: can't be written ({error.strerror or error}). Nothing was published"
        raise OutputError(f"{text}; choose another: --repository") from error


def _move_into_place(stage: Path, model: Path, version: int) -> None:
    if not model.exists():
        stage.rename(model)
        sync(model.parent)
        return
    # The warm-up files of the earlier version stay, because they suit every version. A native front has none.
    for path in (stage / "warmup").glob("*"):
        if not (model / "warmup" / path.name).exists():
            (model / "warmup").mkdir(exist_ok=True)
            path.rename(model / "warmup" / path.name)
    (stage / str(version)).rename(model / str(version))
    try:
        (stage / "config.pbtxt").replace(model / "config.pbtxt")
    except OSError:
        shutil.rmtree(model / str(version))
        raise
    sync(model)


def _write_config(stage: Path, config: Mapping[str, Any]) -> None:
    try:
        from google.protobuf import json_format, text_format
        from tritonclient.grpc import model_config_pb2
    except ModuleNotFoundError as error:
        raise MissingDependency("a model repository", str(error.name), "triton") from None
    message = json_format.ParseDict(config, model_config_pb2.ModelConfig())
    (stage / "config.pbtxt").write_text(text_format.MessageToString(message), encoding="utf-8")


def _front_config(stage: Path, name: str, manifest: Manifest, options: TritonOptions) -> dict[str, Any]:
    """The model that users call: texts in, scores out."""
    parameters = dict(options.runtime)
    if options.trusted_key is not None:
        parameters["trusted_key"] = str(options.trusted_key.absolute())
    if options.environment is not None:
        parameters["EXECUTION_ENV_PATH"] = options.environment
    if options.native:
        parameters["engine"] = name + _ENGINE_SUFFIX
    config: dict[str, Any] = {
        "name": name,
        "backend": "python",
        "maxBatchSize": _ROWS,
        "input": [
            {"name": "query", "dataType": "TYPE_STRING", "dims": [1]},
            {"name": "documents", "dataType": "TYPE_STRING", "dims": [-1], "allowRaggedBatch": True},
        ],
        "output": [
            {"name": "scores", "dataType": "TYPE_FP32", "dims": [-1]},
            {"name": "tokens", "dataType": "TYPE_INT32", "dims": [-1]},
            {"name": "truncated", "dataType": "TYPE_BOOL", "dims": [-1]},
        ],
        # The model cuts batches itself, from all its requests: one instance is enough, and waiting for more is useless.
        "instanceGroup": [{"count": 1, "kind": "KIND_CPU"}],
        "dynamicBatching": {
            "defaultQueuePolicy": {"maxQueueSize": options.max_queued_requests, "allowTimeoutOverride": True}
        },
        "versionPolicy": {"latest": {"numVersions": 1}},
        "parameters": {key: {"stringValue": value} for key, value in sorted(parameters.items())},
    }
    if not options.native:  # a model can't ask another before the server is ready
        texts = {"query": [WARMUP_QUERY.encode()], "documents": [text.encode() for text in WARMUP_DOCUMENTS]}
        samples = {
            tensor: (b"".join(struct.pack("<I", len(text)) + text for text in values), "TYPE_STRING", [len(values)])
            for tensor, values in texts.items()
        }
        config["modelWarmup"] = [_warmup(stage, "two documents", 1, samples)]
    if options.response_cache:
        config["responseCache"] = {"enable": True}
    return config


def _engine_config(stage: Path, manifest: Manifest, name: str, options: TritonOptions) -> dict[str, Any]:
    """The engine in Triton's own backend. It gets whole batches from the front, so Triton forms none."""
    backend = target_named(manifest.target).native_triton_backend
    group: dict[str, Any] = {"count": options.instances, "kind": "KIND_GPU" if options.on_gpu else "KIND_CPU"}
    if manifest.engine is not None:
        group["profile"] = [str(number) for number in range(len(manifest.engine.profiles))]
    # One pair of pad tokens.
    ones, pads = [1] * _WARMUP_TOKENS, [manifest.tokenizer.pad_token_id] * _WARMUP_TOKENS
    values = {"input_ids": pads, "attention_mask": ones, "cu_seqlens": [0, _WARMUP_TOKENS], "longest": ones}
    samples = {}
    for spec in manifest.interface.inputs:
        sample = values[spec.name]
        dims = [1] * (len(spec.shape) - 1) + [len(sample)]
        samples[spec.name] = (struct.pack(f"<{len(sample)}q", *sample), _TYPES[spec.dtype], dims)
    config: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "defaultModelFilename": PurePosixPath(manifest.entry).name,
        "maxBatchSize": 0,
        "input": [_tensor(spec) for spec in manifest.interface.inputs],
        "output": [_tensor(spec) for spec in manifest.interface.outputs],
        "instanceGroup": [group],
        "modelWarmup": [_warmup(stage, "one pair", 0, samples)],
        # The front of the earlier version still asks for its own engine.
        "versionPolicy": {"latest": {"numVersions": 2}},
    }
    if backend == "tensorrt":
        config["platform"] = "tensorrt_plan"
        config["parameters"] = {"tensorrt_version": {"stringValue": manifest.needs.version}}  # for operators
    if backend == "openvino" and manifest.precision == "bf16":
        config["parameters"] = {"HINT_BF16": {"stringValue": "YES"}}
    return config


def _warmup(
    stage: Path, name: str, batch_size: int, samples: Mapping[str, tuple[bytes, str, list[int]]]
) -> dict[str, Any]:
    """A sample that Triton reads from files. `samples`: bytes, type and shape of each input."""
    (stage / "warmup").mkdir()
    inputs = {}
    for tensor, (content, dtype, dims) in samples.items():
        (stage / "warmup" / tensor).write_bytes(content)
        inputs[tensor] = {"dataType": dtype, "dims": dims, "inputDataFile": tensor}
    return {"name": name, "batchSize": batch_size, "inputs": inputs}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    dims = [axis if isinstance(axis, int) else -1 for axis in spec.shape]
    return {"name": spec.name, "dataType": _TYPES[spec.dtype], "dims": dims}
