"""`ettin-export`: checkpoint in, verified artifact out."""

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ettin.artifacts.errors import EttinError, HardwareError, MissingDependency, UsageError
from ettin.artifacts.targets import TARGETS, checked_precision, target_named
from ettin.export import report
from ettin.export.targets.tensorrt_builder import FLAVOURS, BuildOptions
from ettin.runtimes.commands import console

if TYPE_CHECKING:  # these import torch
    from ettin.export.pipeline import Export, Job
    from ettin.export.source.checkpoint import Checkpoint

_MISSING = {"torch", "transformers", "sentence_transformers", "safetensors"}
EXAMPLES = (
    "ettin-export --size demo --target openvino",
    "ettin-export --size 68m --target onnx --precision fp16",
    "ettin-export --checkpoint ./my-fine-tune --target transformers",
    "ettin-export --size 17m --all",
)


@click.command(epilog=console.example_epilog(*EXAMPLES), no_args_is_help=True)
@click.option("--size", help="A released size, or demo: the small checkpoint that comes with this package.")
@click.option("--checkpoint", help="A fine-tune instead: folder or hub id.")
@click.option("--revision", help="Hub commit, branch or tag of --checkpoint.")
@click.option("--target", default="openvino", show_default=True, help=f"What to write: {', '.join(TARGETS)}.")
@click.option("--precision", help="int8, bf16, fp16 or fp32, as the target has them; see --list.  [default: its first]")
@click.option(
    "--all", "everything", is_flag=True, help="Every target (of --precision, if given) that this machine can build."
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder.  [default: ./NAME/TARGET-PRECISION]")
@click.option("--max-length", type=int, help="Tokens that pairs are truncated to.  [default: the checkpoint's]")
@click.option(
    "--verify-pairs", type=click.Path(path_type=Path), help="JSON lines with query and document, verified too."
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="JSON lines to calibrate int8 on.  [default: own texts]"
)
@click.option("--force", is_flag=True, help="Replace an artifact that is already there.")
@click.option("--allow-unverified", is_flag=True, help="Publish what can't be run here; it loads after ettin-verify.")
@click.option("--sign", type=click.Path(path_type=Path), help="Private key (PEM) to sign the artifact with.")
@click.option("--arch", help="TensorRT: the GPU, such as sm_90 or sm_86.  [default: this machine's]")
@click.option(
    "--build-kit", is_flag=True, help="trt: write what builds the engine elsewhere (typed ONNX and a script)."
)
@click.option("--workspace", type=click.IntRange(1), help="TensorRT: MiB of scratch memory.  [default: all]")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="TensorRT: file that makes rebuilds faster."
)
@click.option("--random-weights", is_flag=True, help="The size's shape with random weights: for trying hardware.")
@click.option("--seed", default=0, show_default=True, help="Of the random weights.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder with a tokenizer for random weights.")
@click.option("--dry-run", is_flag=True, help="Read and check, say what would be done, write nothing.")
@click.option("--list", "list_", is_flag=True, help="Sizes, targets and precisions.")
@click.option("--doctor", is_flag=True, help="What is installed, what works here, and the fix for what does not.")
@click.version_option(package_name="ettin-export")
def command(
    size: str | None, checkpoint: str | None, revision: str | None, target: str, precision: str | None,
    everything: bool, output: Path | None, max_length: int | None, verify_pairs: Path | None,
    calibration: Path | None, force: bool,
    allow_unverified: bool, sign: Path | None, arch: str | None, build_kit: bool, workspace: int | None,
    timing_cache: Path | None,
    random_weights: bool, seed: int, tokenizer: Path | None, dry_run: bool, list_: bool,
    doctor: bool,
) -> None:  # fmt: skip
    """Turn an Ettin reranker checkpoint into a fast artifact and prove that its scores are the reference's.

    Steps and times go to stderr, the artifact's path alone to stdout. Exit code 0: verified and published.
    """
    if list_:
        return report.show_list()
    if doctor:
        return report.show_doctor()
    if everything:
        wanted = [
            (each.name, kind) for each in TARGETS.values() for kind in each.precisions if precision in (None, kind)
        ]
        if not wanted:
            raise UsageError(f"no target has a precision '{precision}'. Run: ettin-export --list")
    else:
        wanted = [(target, checked_precision(target_named(target), precision))]
    try:
        from ettin.export.pipeline import Export, Job, Options
        from ettin.export.source.resolve import opened
    except ModuleNotFoundError as error:
        if error.name not in _MISSING:
            raise
        raise MissingDependency("exporting", str(error.name), "export") from None

    with ExitStack() as stack:
        with console.step("read the checkpoint"):
            source = stack.enter_context(
                opened(
                    size=size,
                    checkpoint=checkpoint,
                    revision=revision,
                    random_weights=random_weights,
                    seed=seed,
                    tokenizer=tokenizer,
                )
            )
        build = BuildOptions(arch, build_kit, workspace, timing_cache)
        if not everything and target not in FLAVOURS and build != BuildOptions():
            raise UsageError(
                f"--arch, --build-kit, --workspace and --timing-cache are for {' and '.join(FLAVOURS)}, "
                f"not for '{target}'"
            )
        options = Options(max_length, verify_pairs, calibration, force, allow_unverified, _typed(), build, sign)
        export = Export(source, options, console.step)
        above = output if everything and output else Path(source.name)
        jobs = [
            Job(name, kind, output if output and not everything else above / _folder(name, kind, build))
            for name, kind in wanted
        ]
        _announce(source)
        if dry_run and everything:
            buildable, rows, _ = _sorted(export, jobs)
            report.show_plan(export, buildable)
            return report.show_all(rows) if rows else None
        if dry_run:
            export.check(jobs)
            return report.show_plan(export, jobs)
        return _run_all(export, jobs) if everything else _run_one(export, jobs[0])


def _folder(target: str, precision: str, build: BuildOptions) -> str:
    """Engines for several GPUs lie side by side."""
    named = target in FLAVOURS and build.arch not in (None, "native")
    return f"{target}-{precision}-{build.arch}" if named else f"{target}-{precision}"


def _announce(source: "Checkpoint") -> None:
    at = f" at {source.revision}" if source.revision else ""
    console.note(f"  {source.id}{at}: {source.shape.num_parameters:,} parameters")
    if source.is_random:
        console.note("  RANDOM WEIGHTS: the shape is right, the scores mean nothing", fg="yellow", bold=True)


def _run_one(export: "Export", job: "Job") -> None:
    export.check([job])
    export.prepare([job])
    verification = export.run(job)
    if export.options.build.kit:
        console.note(
            f"  A BUILD KIT: on a machine with TensorRT and a GPU of {export.options.build.arch}, run: "
            f"sh {job.output}/engine/build.sh && ettin-verify {job.output}",
            fg="yellow",
            bold=True,
        )
    elif verification is None:
        console.note(
            f"  NOT VERIFIED: no score of this {job.target} artifact was computed here. It loads after, on the machine "
            f"that runs it: ettin-verify {job.output}",
            fg="yellow",
            bold=True,
        )
    else:
        console.note(f"  {verification.runtime}: {verification.summary}")
    click.echo(job.output)


def _run_all(export: "Export", jobs: "list[Job]") -> None:
    """Exports what can be built here; what can't is a row of the report with its reason."""
    buildable, rows, elsewhere = _sorted(export, jobs)
    for job, outcome in export.run_all(buildable):
        if isinstance(outcome, EttinError):
            rows.append(report.Row(job, None, str(outcome)))
        else:
            rows.append(report.Row(job, outcome, None))
            click.echo(job.output)
    report.show_all(rows)
    failed = sum(row.problem is not None for row in rows) - elsewhere
    if failed:
        raise EttinError(f"{failed} of {len(rows)} exports failed, see the report above")


def _sorted(export: "Export", jobs: "list[Job]") -> "tuple[list[Job], list[report.Row], int]":
    """What can be built here; what can't, and how much of that for want of a package or a device."""
    buildable, rows, elsewhere = [], [], 0
    for job in jobs:
        try:
            export.check([job])
            buildable.append(job)
        except (HardwareError, MissingDependency) as error:
            rows.append(report.Row(job, None, f"not here: {error}"))
            elsewhere += 1
        except EttinError as error:
            rows.append(report.Row(job, None, str(error)))
    return buildable, rows, elsewhere


def _typed() -> str:
    return shlex.join(["ettin-export", *sys.argv[1:]])


def main() -> NoReturn:
    """Entry point."""
    console.run(command, publishes=True)
