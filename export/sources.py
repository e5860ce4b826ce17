"""What the user named → a checked checkpoint."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ettin.artifacts.errors import CheckpointError, UsageError
from ettin.export.checkpoint import Checkpoint, read_checkpoint
from ettin.export.hub import download
from ettin.export.random_checkpoint import write_random_checkpoint
from ettin.export.sizes import DEMO, DEMO_FOLDER, SIZES, checked_size

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
