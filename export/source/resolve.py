"""Resolves what the user named (a size, a folder, a hub id, random weights) to a checked checkpoint."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ettin.artifacts.errors import CheckpointError, MissingDependency, UsageError
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO, DEMO_FOLDER, SIZES
from ettin.export.source.weights import write_random_checkpoint
from ettin.runtimes.hub import first_answer, reached

# Pickled weights, code, and the hub's own ONNX and OpenVINO files (the encoder without its head) are not fetched.
# README.md: its licence and languages go into the cards of artifacts.
_FILES = ["*.json", "*.safetensors", "*/config.json", "*/model.safetensors", "README.md"]
_LEFT_OUT = ["onnx/*", "openvino/*"]
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


def download(hub_id: str, revision: str | None) -> Checkpoint:
    """Fetches a checkpoint into the hub's cache and reads it. Once it is there, no network is needed.

    Raises:
        DownloadError: the hub can't be reached or refuses, and the checkpoint is not in the cache.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise MissingDependency("downloading a checkpoint", str(error.name), "export") from None
    by_hand = f"Or bring it as a folder: hf download {hub_id} --local-dir DIR elsewhere, then --checkpoint DIR"
    problem: Exception | None = None
    with reached(f"{hub_id} at revision {revision}" if revision else hub_id, by_hand):
        try:
            first_answer(lambda: huggingface_hub.HfApi().model_info(hub_id, revision=revision))
        except (errors.HTTPError, OSError) as error:
            problem = error
        try:
            folder = huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=_FILES, ignore_patterns=_LEFT_OUT,
                local_files_only=problem is not None,
            )  # fmt: skip
        except errors.LocalEntryNotFoundError as error:
            raise problem or error from None
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
        DownloadError: it can't be downloaded.
        CheckpointError: the checkpoint can't be read, or is not a reranker that can be exported.
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
