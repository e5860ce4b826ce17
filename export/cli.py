"""`ettin-export`: checkpoint in, verified artifact out."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the user typed, by the names of the options."""

    size: str | None
    checkpoint: str | None
    revision: str | None
    target: str
    precision: str | None
    everything: bool
    output: Path | None
    max_length: int | None
    verify_pairs: Path | None
    calibration: Path | None
    force: bool
    allow_unverified: bool
    sign: Path | None
    push: str | None
    arch: str | None
    build_kit: bool
    workspace: int | None
    timing_cache: Path | None
    random_weights: bool
    seed: int
    tokenizer: Path | None
    dry_run: bool

    def variants(self) -> list[tuple[str, str]]:
        """The targets and precisions that were asked for.

        Raises:
            UsageError: there are none of these names.
        """
        wanted = self.precision.split(",") if self.precision else [None]
        if not self.everything:
            target = target_named(self.target)
            variants = [(self.target, target.checked_precision(precision)) for precision in wanted]
            if len(variants) > len(set(variants)):
                raise UsageError(f"--precision {self.precision}: names one twice")
            if len(variants) > 1 and not {precision for _, precision in variants} <= set(target.shared_precisions):
                several = f", or several of: {', '.join(target.shared_precisions)}" if target.shared_precisions else ""
                raise UsageError(
                    f"an artifact of target '{self.target}' has one precision, expected one of: {self.precision}"
                    f"{several}"
                )
            return variants
        variants = [
            (target.name, precision)
            for target in registered_targets()
            for precision in target.precisions
            if precision in wanted or wanted == [None]
        ]
        if not variants:
            raise UsageError(f"no target has a precision '{self.precision}'. Run: ettin-export --list")
        return variants

    def build_options(self) -> BuildOptions:
        """What TensorRT is told.

        Raises:
            UsageError: the target is not compiled for one GPU architecture.
        """
        build = BuildOptions(self.arch, self.build_kit, self.workspace, self.timing_cache)
        if build != BuildOptions() and not self.everything and not target_named(self.target).is_compiled:
            compiled = " and ".join(target.name for target in registered_targets() if target.is_compiled)
            raise UsageError(
                f"--arch, --build-kit, --workspace and --timing-cache are for {compiled}, not for '{self.target}'"
            )
        return build


class _TargetOption(click.Option):
    """Its help names all targets, and says which are experimental."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names: dict[str, list[str]] = {}
        for target in registered_targets():
            names.setdefault(target.runtime.experimental, []).append(target.name)
        listed = [f"{', '.join(names.pop('', []))}"]
        listed += [f"{', '.join(marked)} (experimental: {reason})" for reason, marked in names.items()]
        self.help = f"What to write: {'; '.join(listed)}."
        return super().get_help_record(ctx)


@click.command(epilog=console.example_epilog(*EXAMPLES), no_args_is_help=True)
@click.option("--size", help="A released size, or demo: the small checkpoint that comes with this package.")
@click.option("--checkpoint", help="A fine-tune instead: folder or hub id.")
@click.option("--revision", help="Hub commit, branch or tag of --checkpoint.")
@click.option("--target", cls=_TargetOption, default="openvino", show_default=True, help="What to write.")
@click.option(
    "--precision",
    help="int8, bf16, fp16 or fp32; --list shows those of each target. onnx: also several, as in fp32,int8, in one "
    "artifact.  [default: its first]",
)
@click.option(
    "--all", "everything", is_flag=True, help="Every target (of --precision, if given) that this machine can build."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the artifact.  [default: ./NAME/TARGET-PRECISION, and -ARCH if it is named; with several "
    "precisions ./NAME/TARGET]",
)
@click.option("--max-length", type=int, help="Tokens that pairs are truncated to.  [default: the checkpoint's]")
@click.option(
    "--verify-pairs", type=click.Path(path_type=Path), help="JSON lines with query and document to verify on, too."
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="JSON lines to calibrate int8 on.  [default: texts of this package]",
)
@click.option("--force", is_flag=True, help="Replace an artifact that is already there.")
@click.option("--allow-unverified", is_flag=True, help="Publish what can't be run here; it loads after ettin-verify.")
@click.option("--sign", type=click.Path(path_type=Path), help="Private key (PEM) to sign the artifact with.")
@click.option("--push", metavar="ORGANISATION/NAME", help="Repository on the hub that gets the artifact, too.")
@click.option("--arch", help="TensorRT: the GPU, such as sm_90 or sm_86.  [default: this machine's]")
@click.option(
    "--build-kit", is_flag=True, help="trt: write what builds the engine elsewhere (typed ONNX and a script)."
)
@click.option("--workspace", type=click.IntRange(1), help="TensorRT: MiB of scratch memory.  [default: all]")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="trt: file that makes rebuilds faster."
)
@click.option("--random-weights", is_flag=True, help="The size's shape with random weights: for trying hardware.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder with the tokenizer of random weights.")
@click.option("--dry-run", is_flag=True, help="Read and check, say what would be done, write nothing.")
@click.option("--list", "show_list", is_flag=True, help="Sizes, targets and precisions.")
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
    return _export(Arguments(**options))


def _export(arguments: Arguments) -> None:
    variants = arguments.variants()
    absent = reports.missing(reports.REFERENCE_PACKAGES)
    if absent:
        raise MissingDependency("exporting", absent[0], "export")
    from ettin.export.source.resolve import opened

    options = Options(
        max_length=arguments.max_length,
        verify_pairs=arguments.verify_pairs,
        calibration=arguments.calibration,
        force=arguments.force,
        allow_unverified=arguments.allow_unverified,
        command=shlex.join(["ettin-export", *sys.argv[1:]]),
        build=arguments.build_options(),
        sign=arguments.sign,
    )
    _check_machine(variants, options, arguments.everything)
    if arguments.push is not None:
        check_push(arguments.push)
    with ExitStack() as stack:
        with console.step("read the checkpoint"):
            checkpoint = stack.enter_context(
                opened(
                    size=arguments.size,
                    checkpoint=arguments.checkpoint,
                    revision=arguments.revision,
                    random_weights=arguments.random_weights,
                    seed=arguments.seed,
                    tokenizer=arguments.tokenizer,
                )
            )
        from ettin.export.pipeline import Export  # imports for seconds: not before it is known to be of use

        export = Export(checkpoint, options, console.Console())
        jobs = _jobs(arguments, variants, checkpoint.name)
        _announce(checkpoint)
        if arguments.dry_run:
            return show_plan(export, jobs, arguments.everything)
        made = run_all(export, jobs) if arguments.everything else run_one(export, jobs)
        if arguments.push is not None and made:
            push_made(made, arguments.push, checkpoint.folder, arguments.allow_unverified)
    return None


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


def _jobs(arguments: Arguments, variants: list[tuple[str, str]], name: str) -> list[Job]:
    """What is made, and where. Engines for several GPUs lie side by side."""
    if arguments.output and not arguments.everything:
        return [Job(target, precision, arguments.output) for target, precision in variants]
    above = arguments.output or Path(name)
    if len(variants) > 1 and not arguments.everything:
        return [Job(target, precision, above / target) for target, precision in variants]
    arch = "" if arguments.arch in (None, "native") else f"-{arguments.arch}"
    return [
        Job(target, precision, above / f"{target}-{precision}{arch if target_named(target).is_compiled else ''}")
        for target, precision in variants
    ]


def _announce(source: "Checkpoint") -> None:
    at = f" at {source.revision}" if source.revision else ""
    console.note(f"  {source.id}{at}: {source.shape.num_parameters:,} parameters")
    if source.is_random:
        console.note("  RANDOM WEIGHTS: the shape is right, the scores mean nothing", fg="yellow", bold=True)


def main() -> NoReturn:
    """Entry point."""
    console.run(command, publishes=True)
