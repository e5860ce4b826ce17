"""`ettin-score`: scores Parquet files with Ray Data."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import click

from ettin.artifacts.errors import MissingDependency
from ettin.runtimes.commands import console


@click.command(
    epilog=console.example_epilog(
        "ettin-score ettin-reranker-demo/openvino-int8 pairs scored",
        "RAY_ADDRESS=auto ettin-score /shared/openvino-int8 s3://bucket/pairs s3://bucket/scored --threads 4",
    )
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("source", metavar="INPUT")
@click.argument("target", metavar="OUTPUT")
@click.option("--query", default="query", show_default=True, help="Column of the queries.")
@click.option("--document", default="document", show_default=True, help="Column of the documents.")
@click.option("--score", default="score", show_default=True, help="Column that the scores are written to.")
@click.option("--actors", type=click.IntRange(1), help="Number of processes.  [default: all cores of the cluster]")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Number of cores of a process.")
@console.PRECISION
@console.MAX_LENGTH
@console.KEY
def command(artifact: Path, source: str, target: str, actors: int | None, **options: Any) -> None:
    """Score the pairs in the Parquet files of the folder INPUT, and write them with their scores to the folder OUTPUT.

    The files must hold a column of queries and a column of documents. Run the same command again after an
    interruption: files that are already in OUTPUT are left out. It runs on the Ray cluster that RAY_ADDRESS names, or
    else on this machine.
    """
    try:
        from ettin.runtimes.clusters.on_ray import score_parquet
        from ettin.runtimes.clusters.tables import TableScorer
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-score", str(error.name), "ray") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells its plan and its progress
    scorer = TableScorer(str(artifact), **options)
    outcomes = score_parquet(scorer, source, target, actors=actors, show_progress_bar=True)
    for outcome in outcomes:
        if outcome.null_rows:
            console.note(str(outcome))
    console.note(f"{sum(outcome.pairs for outcome in outcomes)} pairs in {len(outcomes)} files, now in {target}")


main = partial(console.run, command)
