"""Everything that runs on this machine, size after size: checkpoint → artifacts → one interleaved comparison each."""

import re
from collections.abc import Sequence
from pathlib import Path

from ettin.artifacts.errors import EttinError, UsageError
from ettin.artifacts.manifest import MANIFEST_NAME
from ettin.artifacts.targets import targets
from ettin.bench.texts import text_name
from ettin.export.options import Job, Options, Progress
from ettin.export.pipeline import Export
from ettin.export.source.checkpoint import Checkpoint, read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER, SIZES
from ettin.export.source.weights import write_random_checkpoint

# A pass of the slowest contestant should take seconds, not minutes: pairs by millions of parameters.
_PAIRS = ((5, 200), (25, 120), (50, 48), (100, 16), (200, 10), (2000, 8))


def checkpoint_of(named: str, root: Path, tokenizer: Path | None) -> Checkpoint:
    """A checkpoint that stays where it is, for peers to load.

    Args:
        named: a folder; "demo"; or a released size, whose shape gets random weights.
        root: where random weights are written.
        tokenizer: their tokenizer's folder; None: the embedded checkpoint's.

    Raises:
        UsageError: none of these.
        EttinError: a folder that is not a checkpoint.
    """
    if named == "demo":
        return read_checkpoint(DEMO_FOLDER, id="ettin-reranker-demo")
    if named in SIZES:
        folder = root / f"{named}-random" / "checkpoint"
        if not (folder / "modules.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_random_checkpoint(folder, SIZES[named].shape, 0, tokenizer or DEMO_FOLDER)
        return read_checkpoint(folder, id=f"{named}-random", is_random=True)
    if Path(named).is_dir():
        return read_checkpoint(Path(named))
    raise UsageError(f"'{named}' is neither a folder nor one of: demo, {', '.join(SIZES)}")


def export_all(
    checkpoint: Checkpoint, root: Path, max_length: int, progress: Progress
) -> tuple[list[Path], dict[str, str]]:
    """Every artifact that can be made and proven here; those of an earlier run are kept.

    Args:
        checkpoint: what is exported.
        root: where; each checkpoint has its folder.
        max_length: tokens that artifacts truncate to.
        progress: see `Progress`.

    Returns:
        The artifacts, and why others are missing.
    """
    above = root / re.sub(r"[^\w.-]", "_", checkpoint.id.rsplit("/", 1)[-1])
    export = Export(checkpoint, Options(max_length=max_length, command=f"ettin-bench all {checkpoint.id}"), progress)
    found, missing, jobs = [], {}, []
    for target in targets():
        for precision in target.precisions:
            job = Job(target.name, precision, above / f"{target.name}-{precision}")
            if (job.output / MANIFEST_NAME).exists():
                found.append(job.output)
                continue
            try:
                export.check([job])
                jobs.append(job)
            except EttinError as error:
                missing[f"{target.name}-{precision}"] = str(error)
    for job, outcome in export.run_all(jobs):
        if isinstance(outcome, EttinError):
            missing[f"{job.target}-{job.precision}"] = str(outcome)
        else:
            found.append(job.output)
    return sorted(found), missing


def pairs_for(num_parameters: int) -> int:
    """Pairs in a pass, by the size of the model."""
    return next(count for millions, count in _PAIRS if num_parameters < millions * 1e6)


def result_name(kind: str, checkpoint: Checkpoint, data: Path | None, date: str) -> str:
    """A file name such as 2026-11-21-cpu-17m-random-squad.json."""
    words: Sequence[str] = (date, kind, checkpoint.id.rsplit("/", 1)[-1], text_name(data))
    return "-".join(words) + ".json"
