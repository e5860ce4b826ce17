"""Runs the exports of one `ettin-export`, and says what came of them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ettin.artifacts.errors import EttinError, HardwareError, MissingDependency
from ettin.export import reports
from ettin.export.options import Job
from ettin.export.push import push
from ettin.runtimes.commands import console

if TYPE_CHECKING:  # these import torch
    from ettin.export.pipeline import Export
    from ettin.runtimes.verify import Verification


def show_plan(export: "Export", jobs: list[Job], everything: bool) -> None:
    """Says what would be made, and of `--all` what would not and why."""
    if not everything:
        export.check(jobs)
        return reports.show_plan(export, jobs)
    buildable, rows, _ = _sorted(export, jobs)
    reports.show_plan(export, buildable)
    if rows:
        reports.show_all(rows)
    return None


def run_one(export: "Export", jobs: list[Job]) -> list[Job]:
    """Exports one artifact, of one precision or several."""
    export.check(jobs)
    export.prepare(jobs)
    verifications = export.run_together(jobs) if len(jobs) > 1 else [export.run(jobs[0])]
    for job, verification in zip(jobs, verifications, strict=True):
        _announce_result(export, job, verification)
    click.echo(jobs[0].output)
    return jobs[:1]


def _announce_result(export: "Export", job: Job, verification: "Verification | None") -> None:
    if export.options.build.kit:
        console.note(
            f"  A BUILD KIT: on a machine with TensorRT and a GPU of {export.options.build.arch}, run: "
            f"sh {job.output}/engine/build.sh && ettin-verify {job.output}",
            fg="yellow",
            bold=True,
        )
    elif verification is None:
        console.note(
            f"  NOT VERIFIED: no score of this {job.target} artifact was computed here. To load it, run on "
            f"the machine that will use it: ettin-verify {job.output}",
            fg="yellow",
            bold=True,
        )
    else:
        console.note(f"  {verification.runtime}: {verification.summary}")


def run_all(export: "Export", jobs: list[Job]) -> list[Job]:
    """Exports what can be built here, and returns it; what can't is a row of the report with its reason."""
    buildable, rows, elsewhere = _sorted(export, jobs)
    for job, outcome in export.run_all(buildable):
        if isinstance(outcome, EttinError):
            rows.append(reports.Row(job, None, str(outcome)))
        else:
            rows.append(reports.Row(job, outcome, None))
            click.echo(job.output)
    reports.show_all(rows)
    failed = sum(row.problem is not None for row in rows) - elsewhere
    if failed:
        raise EttinError(f"{failed} of {len(rows)} exports failed, see the report above")
    return buildable


def _sorted(export: "Export", jobs: list[Job]) -> tuple[list[Job], list[reports.Row], int]:
    """What can be built here; what can't, and how much of that for want of a package or a device."""
    buildable, rows, elsewhere = [], [], 0
    for job in jobs:
        try:
            export.check([job])
            buildable.append(job)
        except (HardwareError, MissingDependency) as error:
            rows.append(reports.Row(job, None, f"not here: {error}"))
            elsewhere += 1
        except EttinError as error:
            rows.append(reports.Row(job, None, str(error)))
    return buildable, rows, elsewhere


def push_made(made: list[Job], repository: str, checkpoint: Path, allow_unverified: bool) -> None:
    """Uploads what was made to a repository of the hub, and says how to load it from there."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    artifacts = {job.output.resolve().name: job.output for job in made}
    with console.step(f"push to {repository}"):
        commit, page = push(artifacts, repository, checkpoint, allow_unverified)
    console.note(f"  {page}")
    for name in artifacts:
        console.note(f"  load('{repository}@{commit}/{name}')")
