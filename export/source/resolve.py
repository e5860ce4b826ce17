"""Resolves what the user named (a size, a folder, a hub id, random weights) to a checked checkpoint."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ettin.artifacts.errors import CheckpointError, DownloadError, MissingDependency, UsageError
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO, DEMO_FOLDER, SIZES, checked_size
from ettin.export.source.weights import write_random_checkpoint

# No pickled weights, no code, none of the hub's own ONNX or OpenVINO files (they hold the encoder without its head).
_FILES = ["*.json", "*.safetensors", "*/config.json", "*/model.safetensors"]
_NOT = ["onnx/*", "openvino/*"]


@contextmanager
def reached(what: str, otherwise: str) -> Iterator[None]:
    """Turns a lost connection into one line.

    Args:
        what: is fetched.
        otherwise: what to do without a connection.

    Raises:
        DownloadError: the hub can't be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        # errors.HTTPError is whichever HTTP library's the installed hub client uses; it reports a lost connection.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(f"{what}: the hub can't be reached ({reason}). {otherwise}") from None


def download(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """Fetches a checkpoint into the hub's cache, with the hub's own progress bars; once there, no network is needed.

    Args:
        hub_id: "organisation/name".
        revision: commit, branch or tag; None: main.

    Returns:
        Its folder and its commit.

    Raises:
        DownloadError: no network, no such repository or revision, or no access.
        MissingDependency: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise MissingDependency("downloading a checkpoint", str(error.name), "export") from None
    by_hand = f"Or bring it as a folder: hf download {hub_id} --local-dir DIR elsewhere, then --checkpoint DIR"
    at = f" at revision {revision}" if revision else ""
    with reached(f"{hub_id}{at}", by_hand):
        try:
            folder = huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT
            )
        except errors.GatedRepoError:
            raise DownloadError(
                f"{hub_id}: the hub asks you to accept its terms first. Visit https://huggingface.co/{hub_id} and run: "
                "hf auth login"
            ) from None
        except errors.RepositoryNotFoundError:
            raise DownloadError(
                f"{hub_id}: no such repository on the hub, or a private one. Run: hf auth login"
            ) from None
        except errors.RevisionNotFoundError:
            raise DownloadError(f"{hub_id}: has no revision {revision}. Leave --revision out for the newest") from None
        except errors.HFValidationError as error:
            raise DownloadError(f"{hub_id}: neither a folder here nor a hub id ({error})") from None
    return Path(folder), Path(folder).name


_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


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
    """The checkpoint that is exported; a random one lives as long as the block.

    Args:
        size: "demo" or a released size.
        checkpoint: hub id or folder, instead of a size.
        revision: hub commit, branch or tag of `checkpoint`; sizes are pinned.
        random_weights: the size's shape with random weights.
        seed: of the random weights.
        tokenizer: for random weights, a folder with another tokenizer than the embedded one.

    Raises:
        UsageError: arguments that contradict each other.
        CheckpointError: it can't be had, or is not an Ettin reranker.
    """
    if (size is None) == (checkpoint is None):
        raise UsageError("name one checkpoint: --size demo|17m|…|1b, or --checkpoint FOLDER|HUB_ID")
    if revision and not checkpoint:
        raise UsageError("--revision goes with --checkpoint; sizes are pinned to a revision")
    if random_weights:
        if size is None or checked_size(size) == DEMO:
            raise UsageError(f"--random-weights goes with --size {'|'.join(SIZES)}")
        with tempfile.TemporaryDirectory(prefix="ettin-random-") as folder:
            if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
                raise CheckpointError(f"{tokenizer}: no tokenizer.json")
            write_random_checkpoint(Path(folder), SIZES[size].shape, seed, tokenizer or DEMO_FOLDER)
            yield read_checkpoint(Path(folder), id=SIZES[size].hub_id, is_random=True)
        return
    if tokenizer is not None:
        raise UsageError("--tokenizer goes with --random-weights; a checkpoint has its own")
    if size is not None and checked_size(size) == DEMO:
        yield read_checkpoint(DEMO_FOLDER, id="ettin-reranker-demo")
    elif size is not None:
        yield _from_hub(SIZES[size].hub_id, SIZES[size].revision)
    elif checkpoint is not None and Path(checkpoint).exists():
        if revision:
            raise UsageError(f"--revision names a hub commit, but {checkpoint} is a folder")
        yield read_checkpoint(Path(checkpoint))
    elif checkpoint is not None and _HUB_ID.match(checkpoint):
        yield _from_hub(checkpoint, revision)
    else:
        raise CheckpointError(f"{checkpoint}: no such folder, and not a hub id (organisation/name)")


def _from_hub(hub_id: str, revision: str | None) -> Checkpoint:
    folder, commit = download(hub_id, revision)
    return read_checkpoint(folder, id=hub_id, revision=commit)
