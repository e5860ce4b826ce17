"""Loading: which class runs which target, and what is checked before it does. Engines are imported on use."""

import importlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ettin.artifacts.errors import (
    ArtifactError,
    DamagedArtifact,
    EttinError,
    HardwareError,
    ManifestError,
    UnverifiedArtifact,
    UsageError,
)
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.targets import target_named
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.hub import located
from ettin.runtimes.machine import lacks_vnni, model_name

_RETRY_S = 5.0
_LOG = logging.getLogger("ettin.load")
_announced: set[tuple[str, str]] = set()  # targets and devices that the log has called experimental

_Result = TypeVar("_Result")


def of_current(path: Path, use: Callable[[], _Result]) -> _Result:
    """Calls `use`, and again if it failed while another artifact took the place of the one at `path`.

    Raises:
        ArtifactError: what `use` raised about an artifact that has stayed, or after some seconds: a folder that changes
            again and again would keep the caller for ever.
    """
    deadline_s = time.monotonic() + _RETRY_S
    while True:
        before = _identity(path)
        try:
            return use()
        except ArtifactError:
            if _identity(path) in (before, None) or time.monotonic() > deadline_s:
                raise


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def load(
    path: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    streams: int | None = None,
    cache_dir: str | Path | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    checksums: bool = True,
    allow_unverified: bool = False,
    trusted_key: str | Path | None = None,
    precision: str | None = None,
) -> Runtime:
    """Loads an artifact.

    Args:
        path: its folder, or else its id on the Hugging Face hub: `ORGANISATION/NAME[@REVISION][/FOLDER]`.
        device: "cpu", "cuda" for ONNX Runtime's CUDA provider, torch and TensorRT, or "trt-rtx" for ONNX Runtime's
            TensorRT-RTX provider; None: the one that the artifact is for, "cpu" if it is for both. Never replaced by
            another. One that is experimental is logged, once.
        threads: CPU threads to use; None: one for each core that this process may use (on a hybrid processor, one
            stream leaves out the efficiency cores), but no more than the variable OMP_NUM_THREADS says, which Ray and
            Spark set.
        streams: batches scored at the same time, among which the threads are divided. None: as many as threads, which
            gives the most pairs a second; 1: all threads on one batch, which gives a single pair its score soonest.
        cache_dir: folder where OpenVINO may keep the compiled model, so that the next load is faster; it takes about
            the artifact's own size. ONNX Runtime on "trt-rtx" keeps kernels there. None: nothing is kept.
        max_length: tokens that pairs are truncated to; None: the artifact's.
        batch_tokens: token budget of a batch, padding included; None: the backend's own, chosen by measurement.
        checksums: compare every file with the manifest; False: names, kinds and sizes only. Either way the engine
            gets the files' contents as they are now, and nothing is read from the folder afterwards.
        allow_unverified: load an artifact whose scores nobody has proven yet, and compute in whatever this machine has.
        trusted_key: PEM file with an elliptic-curve public key. The artifact must be signed with its private key, as it
            is, every file of it; without a key, checksums prove that it is whole, and not whose it is.
        precision: which of several precisions in the folder; None: the first.

    Raises:
        ArtifactError: not an artifact, damaged, edited, newer, unverified, or not signed by the key.
        DownloadError: the hub can't be reached, or has no such artifact.
        MissingDependency: the engine is not installed, or for a hub id the hub's client.
        HardwareError: this machine lacks the device or an instruction set.
        UsageError: an argument out of its range, or a device that the artifact is not for.
    """
    for name, count in (("threads", threads), ("streams", streams), ("batch_tokens", batch_tokens)):
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}, expected 1 or more")
    key = Path(trusted_key) if trusted_key is not None else None
    folder = located(path)

    def opened() -> Runtime:
        with OpenArtifact(folder, checksums=checksums, trusted_key=key, precision=precision) as artifact:
            check_usable(artifact, allow_unverified=allow_unverified)
            used = checked_device(artifact.manifest, device)
            _check_cpu(artifact, used)
            cache = Path(cache_dir) if cache_dir else None
            settings = Settings(used, threads, streams, cache, max_length, batch_tokens, allow_unverified, precision)
            return _loaded(artifact, settings)

    return of_current(folder, opened)


def checked_device(manifest: Manifest, device: str | None) -> str:
    """The device to run on: what was asked for, or what the artifact is for.

    Raises:
        UsageError: the artifact's target does not run on it, or the artifact is for another one.
    """
    target, needed = target_named(manifest.target), manifest.needs.device
    if device is None:
        device = target.device_for(needed)
    target.component(device)
    if needed not in ("cpu", "any", device):  # devices of other packages may run what is for a CPU
        raise UsageError(
            f"{manifest.full_name}: {target.name} {manifest.precision} runs on device '{needed}' alone, not on "
            f"'{device}'. Leave out the device, or export another precision"
        )
    return device


def _check_cpu(artifact: OpenArtifact, device: str) -> None:
    """Raises `HardwareError` if it is this machine's CPU, and that lacks instructions."""
    manifest = artifact.manifest
    if "vnni" in manifest.needs.isa and device == "cpu" and lacks_vnni():
        raise HardwareError(
            f"{artifact.path}: int8 sums overflow on {model_name()}, which has no VNNI. Export another precision: "
            f"{manifest.command} --precision fp32"
        )


def _announce(artifact: OpenArtifact, device: str) -> None:
    """Logs a warning, once in a process, about a target and device that nobody should rely on yet."""
    target = target_named(artifact.manifest.target)
    reason = target.component(device).experimental
    if reason and (target.name, device) not in _announced:
        _announced.add((target.name, device))
        _LOG.warning(
            "target '%s' on device '%s' is experimental: %s. Compare its scores with the reference here: "
            "ettin-verify %s --device %s",
            target.name, device, reason, artifact.path, device,
        )  # fmt: skip


def _loaded(artifact: OpenArtifact, settings: Settings) -> Runtime:
    """The runtime, after what it did not read was compared with the manifest, too."""
    runs = target_named(artifact.manifest.target).runtime_class(settings.device)
    _announce(artifact, settings.device)
    try:
        runtime: Runtime = runs(artifact, settings)
    except EttinError:
        raise
    except Exception as error:
        # Whatever an engine makes of bytes that are what the manifest lists, but not what it can load.
        raise ArtifactError(
            f"{artifact.path}: the engine can't load it ({type(error).__name__}: {str(error)[:400]}). "
            f"Export again: {artifact.manifest.command}"
        ) from error
    try:
        artifact.check_contents()
    except BaseException:
        runtime.close()
        raise
    runtime.reload = loaded_again
    return runtime


def loaded_again(folder: str, settings: Settings, digest: str) -> Runtime:
    """Loads a runtime that is unpickled.

    Raises:
        DamagedArtifact: another artifact is in the folder by now.
    """
    runtime = load(folder, **vars(settings))
    if runtime.manifest.digest != digest:
        runtime.close()
        raise DamagedArtifact(f"{folder}: another artifact than the one whose runtime was pickled. Load it by its path")
    return runtime


def checked_manifest(folder: Path, trusted_key: Path | None = None, precision: str | None = None) -> Manifest:
    """The manifest of an artifact that is whole and proven.

    Args:
        folder: the artifact.
        trusted_key: see `load`.
        precision: see `load`.

    Raises:
        ArtifactError: not an artifact, damaged, edited, newer, unverified, or not signed by the key.
    """

    def opened() -> Manifest:
        with OpenArtifact(folder, trusted_key=trusted_key, precision=precision) as artifact:
            check_usable(artifact)
            artifact.check_contents()
            return artifact.manifest

    return of_current(folder, opened)


def check_usable(artifact: OpenArtifact, *, allow_unverified: bool = False) -> None:
    """Whether an artifact holds the files of its manifest and is proven; their contents are compared when read.

    Raises:
        ArtifactError: not an artifact, damaged or unverified.
    """
    folder, manifest = artifact.path, artifact.manifest
    target_named(manifest.target).checked_precision(manifest.precision)
    check_kit(folder, manifest)
    artifact.check()
    if manifest.parity.status == "unverified" and not allow_unverified:
        raise UnverifiedArtifact(f"{folder}: exported without proof of its scores. Run here: ettin-verify {folder}")


def check_kit(folder: Path, manifest: Manifest) -> None:
    """Raises if this folder is a build kit whose engine was not built.

    Raises:
        UnverifiedArtifact: a build kit; says what to run.
    """
    if manifest.is_build_kit and manifest.engine is not None:
        raise UnverifiedArtifact(
            f"{folder}: a build kit, its engine for {manifest.engine.arch} is not built yet. On a machine with such a "
            f"GPU and TensorRT, run: sh {folder}/engine/build.sh && ettin-verify {folder}"
        )


def engine_module(manifest: Manifest) -> Any:
    """The module of the engine that runs an artifact: the target's, whatever the manifest says.

    Raises:
        ManifestError: the manifest names another package.
        MissingDependency: its engine is not installed.
    """
    target = target_named(manifest.target)
    target.runtime_class()
    package = target.runtime.packages[0]
    if manifest.needs.package != package:
        raise ManifestError(
            f"its manifest needs the package '{manifest.needs.package}', but target '{manifest.target}' runs on "
            f"'{package}'. Export again: {manifest.command}"
        )
    return importlib.import_module(package)
