"""What `ettin-export` shows besides its steps."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ettin.artifacts.targets import targets
from ettin.export.doctor import examine
from ettin.export.options import Job
from ettin.export.source.sizes import SIZES
from ettin.runtimes.commands import console

if TYPE_CHECKING:  # these import torch
    from ettin.export.pipeline import Export
    from ettin.runtimes.verify import Verification


@dataclass(frozen=True)
class Row:
    """One export of a run with `--all`.

    Args:
        job: what was to be made.
        verification: what was proven; None if it failed or could not be run here.
        problem: why it failed.
    """

    job: Job
    verification: "Verification | None"
    problem: str | None


def show_list() -> None:
    """Sizes, targets and precisions."""
    demo = ["demo", "2,042,113", "comes with this package", ""]
    sizes = [[size.name, f"{size.parameters:,}", size.hub_id, size.revision[:12]] for size in SIZES.values()]
    console.table([demo, *sizes], ["size", "parameters", "hub id", "pinned revision"])
    click.echo()
    rows = [[target.name, ", ".join(target.precisions), target.runs_on] for target in targets()]
    console.table(rows, ["target", "precisions (first: default)", "runs on"])


def show_doctor() -> None:
    """What is installed, what works here, and the fix for what does not."""
    marks = {True: click.style("ok", fg="green"), False: click.style("no", fg="red"), None: ""}
    rows = []
    for finding in examine():
        rows.append([marks[finding.ok], finding.what, finding.detail])
        if finding.fix:
            rows.append(["", "", click.style(f"Run: {finding.fix}", fg="yellow")])
    console.table(rows)


def show_plan(export: "Export", jobs: list[Job]) -> None:
    """What would be done."""
    for job in jobs:
        size = export.expected_bytes(job) / 2**20
        click.echo(
            f"would write {job.target} {job.precision}, about {size:.0f} MiB, up to {export.max_length} tokens a pair, "
            f"to {job.output}, once its scores are proven"
        )


def show_all(rows: list[Row]) -> None:
    """The report of a run with `--all`."""
    lines = []
    for row in rows:
        figures = ["–"] * 3
        if row.verification is not None:
            parity = row.verification.parity
            figures = [
                "–" if value is None else format(value, form)
                for value, form in (
                    (parity.max_abs_error, ".1e"), (parity.mean_abs_error, ".1e"), (parity.spearman, ".6f"),
                )
            ]  # fmt: skip
        size = "–"
        if row.problem is None:
            files = (path.stat().st_size for path in row.job.output.rglob("*") if path.is_file())
            size = f"{sum(files) / 2**20:.1f}"
        note = (
            str(row.job.output) + ("" if row.verification else " (not verified)")
            if row.problem is None
            else row.problem
        )
        lines.append([row.job.target, row.job.precision, *figures, size, note])
    headers = ["target", "precision", "max |Δ|", "mean |Δ|", "Spearman", "MiB", "artifact or problem"]
    console.table(lines, headers, err=True)
