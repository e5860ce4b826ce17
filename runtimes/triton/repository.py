"""Artifacts → a model repository of Triton Inference Server.

A repository is `NAME/config.pbtxt` and `NAME/VERSION/…`. A version appears whole (it is renamed into place) and is
never changed; publishing again adds the next, to which a server that polls, or is told to load, switches.
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

ENGINE_SUFFIX = "-engine"
ARTIFACT = "artifact"

_MODEL = '''"""Written by ettin-triton: the code is in the installed package."""

from ettin.runtimes.triton.model import {implementation} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}
# What is scored once before a model is ready.
_WARMUP_TEXTS = {"query": [b"what is warmed up"], "documents": [b"the model", b"its kernels " * 40]}
_WARMUP_TOKENS = 64
_ROWS = 64  # requests that are handed to the model at a time


@dataclass(frozen=True)
class TritonOptions:
    """How a model is served.

    Args:
        native: the engine runs in Triton's own backend; False: in the Python backend, in our runtime.
        on_gpu: where Triton puts the engine.
        instances: of a native engine; ours has its own streams.
        environment: virtual environment of the Python backend's models; None: that of the server's Python.
        response_cache: answer equal requests from Triton's cache (the server needs `--cache-config`).
        max_queued_requests: more are refused.
        runtime: arguments of `load`, in words.
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
        The version that it is now.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: a target that can't be served so.
        OutputError: the repository can't be written, or has something else of that name.
        MissingDependency: no tritonclient, which knows the form of the configuration.
    """
    with OpenArtifact(artifact, trusted_key=options.trusted_key) as opened:
        opened.check()
        return _publish(opened, repository, name, options)


def _publish(artifact: OpenArtifact, repository: Path, name: str, options: TritonOptions) -> int:
    manifest = artifact.manifest
    _check(manifest, options)
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UsageError(f"model name '{name}': expected letters, digits, '.', '_' and '-'")
    if options.native:
        version = _next_version(repository, name, name + ENGINE_SUFFIX)
        with _staged(repository, name + ENGINE_SUFFIX, version) as stage:
            _copy_engine(artifact, stage / str(version))
            _write_config(stage, _engine_config(stage, manifest, name + ENGINE_SUFFIX, options))
        # After its engine: the new front may ask for it at once.
        with _staged(repository, name, version) as stage:
            _write_front(stage, version, "NativeModel", name, manifest, options)
            hosted = stage / str(version) / ARTIFACT
            artifact.copy([TOKENIZER_NAME], hosted)
            artifact.copy_proof(hosted)
        return version
    version = _next_version(repository, name)
    with _staged(repository, name, version) as stage:
        _write_front(stage, version, "HostedModel", name, manifest, options)
        artifact.copy_all(stage / str(version) / ARTIFACT)
    return version


def _copy_engine(artifact: OpenArtifact, folder: Path) -> None:
    """Copies what Triton's own backend opens, without the folders above it."""
    entry = PurePosixPath(artifact.manifest.entry)
    names = [file.path for file in artifact.manifest.files]
    # Weights lie beside a graph, with its name and another ending.
    places = [PurePosixPath(name) for name in names]
    beside = [str(each) for each in places if each.parent == entry.parent and each.name.startswith(f"{entry.stem}.")]
    for name in [str(entry)] if artifact.manifest.engine else beside:
        artifact.copy_file(name, folder / PurePosixPath(name).name)


def _check(manifest: Manifest, options: TritonOptions) -> None:
    target, precision = target_named(manifest.target), manifest.precision
    if not target.triton_backends:
        raise UsageError(
            f"target '{target.name}' needs torch, which has no place in a server. Serve another: onnx, openvino, trt"
        )
    if options.native and target.native_triton_backend is None:
        raise UsageError(f"Triton has no backend of its own for target '{target.name}'. Leave out --native")
    if options.native and (target.name, precision) == ("openvino", "fp32"):
        raise UsageError(
            "Triton's OpenVINO backend can't be told to compute in f32 where the CPU has bf16. Leave out --native"
        )


def _next_version(repository: Path, *names: str) -> int:
    found = [
        int(folder.name)
        for name in names
        for folder in (repository / name).glob("*")
        if folder.is_dir() and folder.name.isdigit()
    ]
    return max(found, default=0) + 1


@contextmanager
def _staged(repository: Path, name: str, version: int) -> Iterator[Path]:
    """A folder that becomes the model, or whose version becomes one of the model's, when the block has ended well."""
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
            _into_place(stage, model, version)
    except OSError as error:
        raise OutputError(
            f"{model}: can't be written ({error.strerror or error}). Nothing was published; choose another: "
            "--repository"
        ) from error


def _into_place(stage: Path, model: Path, version: int) -> None:
    if not model.exists():
        stage.rename(model)
        sync(model.parent)
        return
    # The warm-up is that of the version before: what there is to warm up does not change.
    (stage / str(version)).rename(model / str(version))
    try:
        (stage / "config.pbtxt").replace(model / "config.pbtxt")
    except OSError:
        shutil.rmtree(model / str(version))
        raise
    sync(model)


def _pb() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ModuleNotFoundError as error:
        raise MissingDependency("a model repository", str(error.name), "triton") from None
    return model_config_pb2


def _write_config(stage: Path, config: Mapping[str, Any]) -> None:
    from google.protobuf import json_format, text_format

    message = json_format.ParseDict(config, _pb().ModelConfig())
    (stage / "config.pbtxt").write_text(text_format.MessageToString(message), encoding="utf-8")


def _write_front(
    stage: Path, version: int, implementation: str, name: str, manifest: Manifest, options: TritonOptions
) -> None:
    """The model that users call: texts in, scores out."""
    (stage / str(version) / "model.py").write_text(_MODEL.format(implementation=implementation), encoding="utf-8")
    parameters = dict(options.runtime)
    if options.trusted_key is not None:
        parameters["trusted_key"] = str(options.trusted_key.absolute())
    if options.environment is not None:
        parameters["EXECUTION_ENV_PATH"] = options.environment
    if options.native:
        parameters["engine"] = name + ENGINE_SUFFIX
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
        ],
        # The model cuts batches itself, from all requests that it has: one instance, and no reason to wait for more.
        "instanceGroup": [{"count": 1, "kind": "KIND_CPU"}],
        "dynamicBatching": {
            "defaultQueuePolicy": {"maxQueueSize": options.max_queued_requests, "allowTimeoutOverride": True}
        },
        "versionPolicy": {"latest": {"numVersions": 1}},
        "parameters": {key: {"stringValue": value} for key, value in sorted(parameters.items())},
    }
    if not options.native:  # a model can't ask another before the server is ready
        samples = {
            name: (b"".join(struct.pack("<I", len(each)) + each for each in texts), "TYPE_STRING", [len(texts)])
            for name, texts in _WARMUP_TEXTS.items()
        }
        config["modelWarmup"] = [_warmup(stage, "two documents", 1, samples)]
    if options.response_cache:
        config["responseCache"] = {"enable": True}
    _write_config(stage, config)


def _warmup(
    stage: Path, name: str, batch_size: int, samples: Mapping[str, tuple[bytes, str, list[int]]]
) -> dict[str, Any]:
    """A sample that Triton reads from files: by input its bytes, type and shape."""
    (stage / "warmup").mkdir()
    for tensor, (content, _, _) in samples.items():
        (stage / "warmup" / tensor).write_bytes(content)
    inputs = {
        tensor: {"dataType": kind, "dims": dims, "inputDataFile": tensor} for tensor, (_, kind, dims) in samples.items()
    }
    return {"name": name, "batchSize": batch_size, "inputs": inputs}


def _engine_warmup(stage: Path, manifest: Manifest) -> dict[str, Any]:
    """One pair of pad tokens."""
    ones, pads = [1] * _WARMUP_TOKENS, [manifest.tokenizer.pad_token_id] * _WARMUP_TOKENS
    values = {"input_ids": pads, "attention_mask": ones, "cu_seqlens": [0, _WARMUP_TOKENS], "longest": ones}
    samples = {}
    for spec in manifest.interface.inputs:
        sample = values[spec.name]
        dims = [1] * (len(spec.shape) - 1) + [len(sample)]
        samples[spec.name] = (struct.pack(f"<{len(sample)}q", *sample), _TYPES[spec.dtype], dims)
    return _warmup(stage, "one pair", 0, samples)


def _engine_config(stage: Path, manifest: Manifest, name: str, options: TritonOptions) -> dict[str, Any]:
    """The model in Triton's own backend. It gets whole batches from the front, so Triton forms none."""
    backend = target_named(manifest.target).native_triton_backend
    group: dict[str, Any] = {"count": options.instances, "kind": "KIND_GPU" if options.on_gpu else "KIND_CPU"}
    if manifest.engine is not None:
        group["profile"] = [str(number) for number in range(len(manifest.engine.profiles))]
    config: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "defaultModelFilename": PurePosixPath(manifest.entry).name,
        "maxBatchSize": 0,
        "input": [_tensor(each) for each in manifest.interface.inputs],
        "output": [_tensor(each) for each in manifest.interface.outputs],
        "instanceGroup": [group],
        "modelWarmup": [_engine_warmup(stage, manifest)],
        # The front of the version before still asks for its own engine.
        "versionPolicy": {"latest": {"numVersions": 2}},
    }
    if backend == "tensorrt":
        config["platform"] = "tensorrt_plan"
        config["parameters"] = {"tensorrt_version": {"stringValue": manifest.needs.version}}  # for whoever looks
    if backend == "openvino" and manifest.precision == "bf16":
        config["parameters"] = {"HINT_BF16": {"stringValue": "YES"}}
    return config


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    dims = [axis if isinstance(axis, int) else -1 for axis in spec.shape]
    return {"name": spec.name, "dataType": _TYPES[spec.dtype], "dims": dims}
