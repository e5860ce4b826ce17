"""Scoring of Parquet files with Ray Data: an actor for each share of the cores."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError
from tqdm import tqdm

from ettin.artifacts.errors import InputError, ScoringError, UsageError
from ettin.runtimes.clusters.parquet_files import Outcome, ParquetJob, Part
from ettin.runtimes.clusters.tables import TableScorer
from ettin.runtimes.clusters.workers import process_runtime
from ettin.runtimes.loading import load


class _Actor:
    """Scores files with a runtime of its own."""

    def __init__(self, job: ParquetJob) -> None:
        self._job = job
        process_runtime(job.scorer.artifact, **job.scorer.settings)

    def __call__(self, part: Mapping[str, Any]) -> dict[str, Any]:
        return asdict(self._job.score(Part(**part)))


def score_parquet(
    scorer: TableScorer, source: str, target: str, *, actors: int | None = None, show_progress_bar: bool = False
) -> list[Outcome]:
    """Scores the pairs of all Parquet files of a folder on a Ray cluster, which is this machine unless Ray says else.

    Files that a former run has scored are left out, so a run that was killed is started again as it was. If an actor
    dies, Ray starts another, which scores the file again.

    Args:
        scorer: what adds the scores. Every node finds its artifact at the same path. `threads` is the number of cores
            of an actor, by default 1, which gives the most pairs a second; more take less memory.
        source: see `ParquetJob`. A file is the unit of work: have many more of them than actors.
        target: see `ParquetJob`; every node can write there.
        actors: processes that score; None: as many as the cluster has cores for.
        show_progress_bar: show the pairs that are done on stderr.

    Returns:
        What became of each file that this run scored.

    Raises:
        EttinError: see `load` and `ParquetJob.parts`; nothing was scored.
        UsageError: the cluster has fewer cores than the actors need; nothing was scored.
        InputError: files that could not be scored, after all others were.
        ScoringError: Ray gave up, for example because it lost the cluster.
    """
    threads = scorer.settings.get("threads") or 1
    with load(scorer.artifact, **{**scorer.settings, "threads": 1}) as runtime:  # what is wrong is one line here
        digest = runtime.manifest.digest
    job = ParquetJob(scorer.with_settings(threads=threads), digest, source, target)
    parts, done_pairs = job.parts()
    outcomes = list(_scored(job, parts, done_pairs, actors, threads, show_progress_bar)) if parts else []
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise InputError(f"{len(failed)} of {len(parts)} files have no scores. {failed[0]}")
    left, _ = job.parts()
    if left:
        raise ScoringError(f"{len(left)} files have no scores, the first is {left[0].source}. Run the same again")
    return outcomes


def _scored(
    job: ParquetJob, parts: list[Part], done_pairs: int, actors: int | None, threads: int, progress: bool
) -> Iterator[Outcome]:
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    most = int(ray.cluster_resources().get("CPU", 0)) // threads
    if most < (actors or 1):
        raise UsageError(f"{actors or 1} actors of {threads} threads, but the cluster has cores for {most}")
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(
        _Actor,
        fn_constructor_args=[job],
        compute=ray.data.ActorPoolStrategy(size=min(actors or most, len(parts))),
        num_cpus=threads,
    )
    pairs = done_pairs + sum(part.pairs for part in parts)
    try:
        with tqdm(total=pairs, initial=done_pairs, unit="pairs", unit_scale=True, disable=not progress) as bar:
            for row in rows.iter_rows():
                bar.update(row["pairs"])
                yield Outcome(**row)
    except RayError as error:
        why = str(error).strip().rpartition("\n")[2][:300]
        raise ScoringError(f"Ray gave up ({why}). Run the same again: what is scored stays") from error
