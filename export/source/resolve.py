"""Resolves what the user named (a size, a folder, a hub id, random weights) to a checked checkpoint."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ettin.artifacts.errors import CheckpointError, DownloadError, MissingDependency, UsageError
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO, DEMO_FOLDER, SIZES
from ettin.export.source.weights import write_random_checkpoint

# Pickled weights, code, and the hub's own ONNX and OpenVINO files (the encoder without its head) are not fetched.
_FILES = ["*.json", "*.safetensors", "*/config.json", "*/model.safetensors"]
_LEFT_OUT = ["onnx/*", "openvino/*"]
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


@contextmanager
def reached(what: str, otherwise: str) -> Iterator[None]:
    """Turns a lost connection into one line.

    Args:
        what: what is fetched.
        otherwise: what the user can do without a connection.

    Raises:
        DownloadError: the hub can't be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        # errors.HTTPError is that of the HTTP library which the installed hub client uses.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(f"{what}: the hub can't be reached ({reason}). {otherwise}") from None


def download(hub_id: str, revision: str | None) -> Checkpoint:
    """Fetches a checkpoint into the hub's cache and reads it. Once it is there, no network is needed."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise MissingDependency("downloading a checkpoint", str(error.name), "export") from None
    refusals = {  # the first that matches: a gated repository is also one that is not found
        errors.GatedRepoError: "the hub asks you to accept its terms first. Visit "
        f"https://huggingface.co/{hub_id} and run: hf auth login",
        errors.RepositoryNotFoundError: "no such repository on the hub, or a private one. Run: hf auth login",
        errors.RevisionNotFoundError: f"has no revision {revision}. Leave --revision out for the newest",
        errors.HFValidationError: "neither a folder here nor a hub id",
    }
    by_hand = f"Or bring it as a folder: hf download {hub_id} --local-dir DIR elsewhere, then --checkpoint DIR"
    with reached(f"{hub_id} at revision {revision}" if revision else hub_id, by_hand):
        try:
            folder = huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=_FILES, ignore_patterns=_LEFT_OUT
            )
        except tuple(refusals) as error:
            reason = next(text for kind, text in refusals.items() if isinstance(error, kind))
            raise DownloadError(f"{hub_id}: {reason}") from None
    return read_checkpoint(Path(folder), id=hub_id, revision=Path(folder).name)


@contextmanager
def opened(
    *,
    size: str | None = None,
    checkpoint: str | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> Iterator[Checkpoint]:
    """The checkpoint that the options of the same names choose. One with random weights exists during the block.

    Raises:
        UsageError: options that contradict each other.
        CheckpointError: the checkpoint can't be read or downloaded, or is not a reranker that can be exported.
    """
    if (size is None) == (checkpoint is None):
        raise UsageError("name one checkpoint: --size demo|17m|…|1b, or --checkpoint FOLDER|HUB_ID")
    released = SIZES.get(size or "")
    if size not in (None, DEMO) and released is None:
        raise UsageError(f"unknown size '{size}', expected one of: {', '.join([DEMO, *SIZES])}")
    if revision and not checkpoint:
        raise UsageError("--revision goes with --checkpoint; sizes are pinned to a revision")
    if random_weights and released is None:
        raise UsageError(f"--random-weights goes with --size {'|'.join(SIZES)}")
    if tokenizer is not None and not random_weights:
        raise UsageError("--tokenizer goes with --random-weights; a checkpoint has its own")
    if released is not None and random_weights:
        if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
            raise CheckpointError(f"{tokenizer}: no tokenizer.json")
        with tempfile.TemporaryDirectory(prefix="ettin-random-") as folder:
            write_random_checkpoint(Path(folder), released.shape, seed, tokenizer or DEMO_FOLDER)
            yield read_checkpoint(Path(folder), id=released.hub_id, is_random=True)
    elif released is not None:
        yield download(released.hub_id, released.revision)
    elif checkpoint is not None:
        yield _named(checkpoint, revision)
    else:
        yield read_checkpoint(DEMO_FOLDER, id="ettin-reranker-demo")


def _named(checkpoint: str, revision: str | None) -> Checkpoint:
    """What `--checkpoint` names: a folder, or else a repository on the hub."""
    if Path(checkpoint).exists():
        if revision:
            raise UsageError(f"--revision names a hub commit, but {checkpoint} is a folder")
        return read_checkpoint(Path(checkpoint))
    if not _HUB_ID.match(checkpoint):
        raise CheckpointError(f"{checkpoint}: no such folder, and not a hub id (organisation/name)")
    return download(checkpoint, revision)
