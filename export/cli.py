"""`ettin-export`: checkpoint in, verified artifact out."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ettin.artifacts.errors import EttinError, MissingDependency, UsageError
from ettin.artifacts.targets import registered_targets, target_named
from ettin.export import reports
from ettin.export.options import BuildOptions, Job, Options
from ettin.export.push import check_push
from ettin.export.runs import push_made, run_all, run_one, show_plan
from ettin.runtimes.commands import console

if TYPE_CHECKING:  # these import torch
    from ettin.export.source.checkpoint import Checkpoint

EXAMPLES = (
    "ettin-export --size demo --target openvino",
    "ettin-export --size 68m --target onnx --precision fp16",
    "ettin-export --checkpoint ./my-fine-tune --target transformers",
    "ettin-export --size 17m --all",
)


# What `source.resolve.opened` takes.
_SOURCE = ("size", "checkpoint", "revision", "random_weights", "seed", "tokenizer")


class _TargetOption(click.Option):
    """Its help names all targets, and says which are experimental."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names: dict[str, list[str]] = {}
        for target in registered_targets():
            names.setdefault(target.runtime.experimental, []).append(target.name)
        listed = [", ".join(names.pop("", []))]
        listed += [f"{', '.join(marked)} (experimental: {reason})" for reason, marked in names.items()]
        self.help = f"What to write: {'; '.join(listed)}."
        return super().get_help_record(ctx)


@click.command(epilog=console.example_epilog(*EXAMPLES), no_args_is_help=True)
@click.option("--size", help="A released size, or demo: the small checkpoint that comes with this package.")
@click.option("--checkpoint", help="Folder or hub id of a checkpoint, in place of --size.")
@click.option("--revision", help="Commit, branch or tag of --checkpoint on the hub.")
@click.option("--target", cls=_TargetOption, default="openvino", show_default=True, help="What to write.")
@click.option(
    "--precision",
    help="int8, bf16, fp16 or fp32; --list shows those of each target. onnx: also several, as in fp32,int8, in one "
    "artifact.  [default: its first]",
)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Export every target that this machine can build, in the precisions of --precision or in all.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the artifact.  [default: ./NAME/TARGET-PRECISION, and -ARCH if it is named; with several "
    "precisions ./NAME/TARGET]",
)
@click.option("--max-length", type=int, help="Tokens that pairs are truncated to.  [default: the checkpoint's]")
@click.option(
    "--verify-pairs",
    type=click.Path(path_type=Path),
    help='File of JSON lines with "query" and "document": further pairs to verify on.',
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="File of JSON lines to calibrate int8 on.  [default: texts of this package]",
)
@click.option("--force", is_flag=True, help="Replace an artifact that is already there.")
@click.option(
    "--allow-unverified",
    is_flag=True,
    help="Publish artifacts that can't be run here. They can be loaded after ettin-verify.",
)
@click.option("--sign", type=click.Path(path_type=Path), help="Private key (PEM) to sign the artifact with.")
@click.option("--push", metavar="ORGANISATION/NAME", help="Upload the artifact to this repository on the hub, too.")
@click.option("--arch", help="TensorRT: architecture of the GPU, such as sm_90 or sm_86.  [default: this machine's]")
@click.option(
    "--build-kit", is_flag=True, help="trt: write what builds the engine elsewhere (typed ONNX and a script)."
)
@click.option("--workspace", type=click.IntRange(1), help="TensorRT: scratch memory in MiB.  [default: all]")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="trt: file that makes rebuilds faster."
)
@click.option("--random-weights", is_flag=True, help="Use random weights in the shape of --size, to try hardware.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder with the tokenizer of random weights.")
@click.option(
    "--dry-run", is_flag=True, help="Read and check everything and say what would be done, but write nothing."
)
@click.option("--list", "show_list", is_flag=True, help="Show sizes, targets and precisions.")
@click.option(
    "--doctor",
    "show_doctor",
    is_flag=True,
    help="Show which targets and servers work on this machine, and a repair command for each that does not.",
)
@click.version_option(package_name="ettin-export")
def command(show_list: bool, show_doctor: bool, **options: Any) -> None:
    """Turn an Ettin reranker checkpoint into a fast artifact and prove that its scores are the reference's.

    Steps and times go to stderr, the artifact's path alone to stdout. Exit code 0: verified and published.
    """
    if show_list:
        return reports.show_list()
    if show_doctor:
        return reports.show_doctor()
    return _export(**options)


def _export(
    *, target: str, precision: str | None, everything: bool, output: Path | None, push: str | None, dry_run: bool,
    arch: str | None, build_kit: bool, workspace: int | None, timing_cache: Path | None, **others: Any,
) -> None:  # fmt: skip
    variants = _variants(target, precision, everything)
    absent = reports.missing(reports.REFERENCE_PACKAGES)
    if absent:
        raise MissingDependency("exporting", absent[0], "export")
    from ettin.export.source.resolve import opened

    source = {name: others.pop(name) for name in _SOURCE}
    build = BuildOptions(arch, build_kit, workspace, timing_cache)
    if build != BuildOptions() and not everything and not target_named(target).is_compiled:
        compiled = " and ".join(other.name for other in registered_targets() if other.is_compiled)
        raise UsageError(f"--arch, --build-kit, --workspace and --timing-cache are for {compiled}, not for '{target}'")
    options = Options(command=shlex.join(["ettin-export", *sys.argv[1:]]), build=build, **others)
    _check_machine(variants, options, everything)
    if push is not None:
        check_push(push)
    with ExitStack() as stack:
        with console.step("read the checkpoint"):
            checkpoint = stack.enter_context(opened(**source))
        from ettin.export.pipeline import Export  # imports for seconds: not before it is known to be of use

        export = Export(checkpoint, options, console.Console())
        jobs = _jobs(variants, output, Path(checkpoint.name), arch, everything)
        _announce(checkpoint)
        if dry_run:
            return show_plan(export, jobs, everything)
        made = run_all(export, jobs) if everything else run_one(export, jobs)
        if push is not None and made:
            push_made(made, push, checkpoint.folder, options.allow_unverified)
    return None


def _variants(name: str, precision: str | None, everything: bool) -> list[tuple[str, str]]:
    """The targets and precisions that were asked for; raises `UsageError` if there are none of these names."""
    wanted = precision.split(",") if precision else [None]
    if everything:
        every = [(target.name, chosen) for target in registered_targets() for chosen in target.precisions]
        unknown = set(wanted) - {None, *(chosen for _, chosen in every)}
        if unknown:
            raise UsageError(f"no target has a precision '{min(map(str, unknown))}'. Run: ettin-export --list")
        return [(target, chosen) for target, chosen in every if chosen in wanted or wanted == [None]]
    target = target_named(name)
    variants = [(name, target.checked_precision(chosen)) for chosen in wanted]
    if len(variants) > len(set(variants)):
        raise UsageError(f"--precision {precision}: names one twice")
    if len(variants) > 1 and not {chosen for _, chosen in variants} <= set(target.shared_precisions):
        several = f", or several of: {', '.join(target.shared_precisions)}" if target.shared_precisions else ""
        raise UsageError(f"an artifact of target '{name}' has one precision, expected one of: {precision}{several}")
    return variants


def _check_machine(variants: Sequence[tuple[str, str]], options: Options, everything: bool) -> None:
    """Says what can't be made here before anything is downloaded; an error unless `everything` leaves something."""
    from ettin.export.writer import check_machine

    problems: dict[tuple[str, str], EttinError] = {}
    for target, precision in variants:
        try:
            check_machine(target, precision, options)
        except EttinError as error:
            problems[target, precision] = error
    if everything:
        for note in dict.fromkeys(f"  target '{target}': not here: {error}" for (target, _), error in problems.items()):
            console.note(note)
    if len(problems) == len(variants) or (problems and not everything):
        raise EttinError("no target can be exported here, see above") if everything else next(iter(problems.values()))


def _jobs(
    variants: list[tuple[str, str]], output: Path | None, default: Path, arch: str | None, everything: bool
) -> list[Job]:
    """What is made, and where. Engines for several GPUs lie side by side."""
    above, suffix = output or default, "" if arch in (None, "native") else f"-{arch}"

    def folder(target: str, precision: str) -> Path:
        if not everything and (output or len(variants) > 1):
            return output or above / target
        return above / f"{target}-{precision}{suffix if target_named(target).is_compiled else ''}"

    return [Job(target, precision, folder(target, precision)) for target, precision in variants]


def _announce(source: "Checkpoint") -> None:
    at = f" at {source.revision}" if source.revision else ""
    console.note(f"  {source.id}{at}: {source.shape.num_parameters:,} parameters")
    if source.is_random:
        console.note("  RANDOM WEIGHTS: the shape is right, the scores mean nothing", fg="yellow", bold=True)


def main() -> NoReturn:
    """Entry point."""
    console.run(command, publishes=True)
