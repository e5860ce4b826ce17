"""The five steps of an export: read, rewrite, lower, verify, publish."""

import functools
import gc
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ettin.artifacts.errors import EttinError, HardwareError, MissingDependency, OutputError, ParityError, UsageError
from ettin.artifacts.manifest import Calibration, Parity
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.parity import write_parity
from ettin.artifacts.publishing import NEW, check_output, staged, workspace
from ettin.artifacts.signatures import read_private_key
from ettin.artifacts.targets import TARGETS
from ettin.artifacts.tolerances import FP16_MAX_ACTIVATION, REDUCED_RATIO
from ettin.export.lowering import Lowered, lower
from ettin.export.quantise import LADDER, CalibrationText, Quantised, Scheme, calibration_text, quantised
from ettin.export.record import REFERENCE, About, unverified, write_manifest
from ettin.export.reference import Gold, proof_pairs, score_gold
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.targets.tensorrt_builder import FLAVOURS, BuildOptions, check_options, checked_arch
from ettin.export.writers import WRITERS, lowering
from ettin.runtimes.loading import runtime_class
from ettin.runtimes.machine import gpus
from ettin.runtimes.tokenizer import PairTokenizer
from ettin.runtimes.verify import Verification, verify_in_child

_CALIBRATION_TOKENS = 1024
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 2}  # int8: embeddings are kept in bf16 or fp32


class Steps(Protocol):
    """Shows progress: `with steps("verify"): …`."""

    def __call__(self, what: str) -> AbstractContextManager[None]:
        """A step that takes time."""
        ...


@dataclass(frozen=True)
class Job:
    """One artifact to make.

    Args:
        target: see `TARGETS`.
        precision: see `TARGETS`.
        output: its folder.
    """

    target: str
    precision: str
    output: Path


@dataclass(frozen=True)
class Options:
    """What all artifacts of a run have in common.

    Args:
        max_length: tokens that they truncate to; None: the checkpoint's.
        verify_pairs: JSON lines with more pairs to verify on.
        calibration: JSON lines with pairs to calibrate int8 on; None: the project's own.
        force: replace artifacts that are already there.
        allow_unverified: publish what can't be run here, marked as unverified.
        command: what the user typed, for the manifest.
        build: for TensorRT.
        sign: PEM file with the private key that artifacts are signed with; None: they are not signed.
    """

    max_length: int | None = None
    verify_pairs: Path | None = None
    calibration: Path | None = None
    force: bool = False
    allow_unverified: bool = False
    command: str = "ettin-export"
    build: BuildOptions = field(default_factory=BuildOptions)
    sign: Path | None = None


@dataclass
class Export:
    """Exports one checkpoint to any number of targets; gold is scored once.

    Args:
        checkpoint: what is exported.
        options: see `Options`.
        step: shows progress.
    """

    checkpoint: Checkpoint
    options: Options
    step: Steps
    _gold: Gold | None = None
    _proven_fp32: set[str] = field(default_factory=set)

    @property
    def max_length(self) -> int:
        """Tokens that the artifacts truncate to.

        Raises:
            UsageError: more than the checkpoint's, or no room for a text.
        """
        most, asked = self.checkpoint.max_length_tokens, self.options.max_length
        if asked is not None and not 8 <= asked <= most:
            raise UsageError(f"--max-length is {asked}, expected 8 to {most} (what the checkpoint was made for)")
        return asked or most

    def check(self, jobs: Sequence[Job]) -> None:
        """Whatever can be refused before work begins.

        Raises:
            EttinError: an output that can't be written, a missing package, too little disk space.
        """
        _ = self.max_length
        if self.options.sign is not None:
            read_private_key(self.options.sign)
        if any(job.precision == "int8" for job in jobs):
            _ = self._calibration
        for job in jobs:
            check_output(job.output, self.options.force)
            lowering(job.target)
            check_options(job.target, self.options.build)
            self._can_be_proven(job)
        if jobs:
            need = max(self.expected_bytes(job) * (1 if job.precision == "fp32" else 3) for job in jobs)
            where = jobs[0].output.absolute()
            while not where.exists():
                where = where.parent
            free = shutil.disk_usage(where).free
            if free < need:
                raise OutputError(
                    f"{where}: {free >> 20} MiB free, this export needs {need >> 20}. Choose another: --output DIR"
                )

    def expected_bytes(self, job: Job) -> int:
        """Size of the artifact, roughly: its weights."""
        return self.checkpoint.shape.num_parameters * _BYTES[job.precision]

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Scores gold for all jobs."""
        precisions = {job.precision for job in jobs}
        pairs = proof_pairs(self.options.verify_pairs, ranking="int8" in precisions and not self.checkpoint.is_random)
        with self.step(f"score {len(pairs)} pairs with the reference"):
            self._gold = score_gold(
                self.checkpoint,
                pairs,
                self.max_length,
                with_bf16=bool(precisions & set(REDUCED_RATIO)),
                with_activations="fp16" in precisions,
            )

    def run_all(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Verification | EttinError | None]]:
        """Runs jobs by target, fp32 first: reduced precisions need not prove the graph that it has proven.

        Yields:
            Each job and what `run` returned, or why it failed.
        """
        if jobs:
            self.prepare(jobs)
        targets = list(TARGETS)
        for job in sorted(jobs, key=lambda job: (targets.index(job.target), job.precision != "fp32")):
            outcome: Verification | EttinError | None
            try:
                outcome = self.run(job)
            except EttinError as error:
                outcome = error
            yield job, outcome

    def run(self, job: Job) -> Verification | None:
        """Makes, verifies and publishes one artifact.

        Returns:
            What was proven; None for one published without proof (`allow_unverified`).

        Raises:
            ParityError: the scores differ from gold; nothing was published.
            EttinError: anything else; nothing was published.
        """
        proven, proof = self._can_be_proven(job), WRITERS[job.target].proof
        if self._gold is None:
            self.prepare([job])
        assert self._gold is not None  # noqa: S101 (set by prepare)
        largest = self._gold.max_activation
        if job.precision == "fp16" and (largest is None or largest > FP16_MAX_ACTIVATION):
            raise ParityError(
                f"fp16 ends at 65504, an activation of gold reaches {largest}, limit "
                f"{FP16_MAX_ACTIVATION:.0f}. Export another precision: --target {job.target} --precision fp32"
            )
        if job.precision != "fp32" and (proven or proof) and (proof or job.target) not in self._proven_fp32:
            self._prove_fp32(job, proof)
        schemes = LADDER if job.precision == "int8" else (None,)
        for scheme in schemes:
            try:
                verification = self._publish(job, scheme, proven)
                break
            except ParityError as error:
                if scheme is schemes[-1]:
                    raise
                with self.step(f"int8 of {scheme.name if scheme else ''} is not good enough ({error})"):
                    pass
        if job.precision == "fp32":
            self._proven_fp32.add(job.target)
        return verification

    def _publish(self, job: Job, scheme: Scheme | None, proven: bool) -> Verification | None:
        assert self._gold is not None  # noqa: S101 (set by prepare)
        quantise = functools.partial(self._quantise, scheme) if scheme else None
        with staged(job.output, self.options.force) as stage:
            with self.step(f"write {job.target} {job.precision}"):
                lowered = lower(
                    self.checkpoint, job.target, job.precision, stage, quantise, self.max_length, self.options.build
                )
                gc.collect()  # a 1b's weights, several times over, before a child loads them again
                write_parity(stage, self._gold.cases)
                record = self._calibration_record(scheme, lowered) if scheme else None
                self._write_manifest(stage, job, lowered, unverified(), record)
            verification = None
            if proven:
                verification = self._verify(stage, job.target, job.precision)
                self._write_manifest(stage, job, lowered, verification.parity(REFERENCE), record)
            if self.options.sign is not None:
                with OpenArtifact(stage) as artifact:
                    artifact.sign(self.options.sign)
        return verification

    @functools.cached_property
    def _calibration(self) -> CalibrationText:
        return calibration_text(self.options.calibration)

    def _quantise(self, scheme: Scheme, folded: dict[str, Tensor]) -> Quantised:
        tokenizer = PairTokenizer(self.checkpoint.folder / "tokenizer.json")
        sequences = self._calibration.sequences(tokenizer, min(self.max_length, _CALIBRATION_TOKENS))
        return quantised(folded, self.checkpoint.shape, sequences, scheme)

    def _calibration_record(self, scheme: Scheme, lowered: Lowered) -> Calibration:
        text = self._calibration
        return Calibration(
            text=text.name, text_sha256=text.sha256, pairs=len(text.pairs), scheme=scheme.name,
            float_linears=lowered.float_linears,
        )  # fmt: skip

    def _can_be_proven(self, job: Job) -> bool:
        """Whether the artifact can be run here; False only where it may be published unproven.

        Raises:
            EttinError: what keeps it from being run, and so from being proven.
        """
        is_engine = job.target in FLAVOURS
        if is_engine and self.options.build.kit:
            return False  # a kit is proven when its engine is built
        try:
            engine = runtime_class(job.target)
            if is_engine:
                engine.check_machine(job.target, checked_arch(job.target, self.options.build.arch, gpus()))
        except MissingDependency:
            if not self.options.allow_unverified:
                raise
            return False
        except HardwareError as error:
            if not self.options.allow_unverified:
                raise HardwareError(
                    f"{error}; so its scores can't be proven here. Publish it unproven: --allow-unverified, then where "
                    "it runs: ettin-verify"
                ) from None
            return False
        return True

    def _prove_fp32(self, job: Job, proof: str | None) -> None:
        """A reduced precision is made only from a lowered graph that passed in fp32.

        Args:
            job: what is to be made.
            proof: what is lowered for it, an `onnx` artifact; None: the job's target.
        """
        assert self._gold is not None  # noqa: S101
        with workspace(job.output) as folder:
            stage = folder / NEW
            stage.mkdir()
            target = "onnx" if proof else job.target
            with self.step(f"write {proof or job.target} fp32, to prove the graph"):
                lowered = lower(self.checkpoint, proof or job.target, "fp32", stage, None, self.max_length)
                write_parity(stage, self._gold.cases)
                self._write_manifest(stage, Job(target, "fp32", job.output), lowered, unverified())
            self._verify(stage, target, "fp32")
        self._proven_fp32.add(proof or job.target)

    def _verify(self, stage: Path, target: str, precision: str) -> Verification:
        with self.step(f"verify {precision}"):
            found = self._passed(verify_in_child(stage))
        for elsewhere in WRITERS[target].elsewhere(precision):
            with self.step(f"verify {precision} with {' '.join(f'{key}={value}' for key, value in elsewhere.items())}"):
                found = found.joined(self._passed(verify_in_child(stage, elsewhere)))
        return found

    def _passed(self, found: Verification) -> Verification:
        if not found.ok:
            raise ParityError(
                f"{found.runtime}: scores differ from the reference: {found.summary}; limit: {found.rule}; "
                f"worst pair: {found.worst_pair}. Nothing was published"
            )
        return found

    def _write_manifest(
        self, stage: Path, job: Job, lowered: Lowered, parity: Parity, calibration: Calibration | None = None
    ) -> None:
        about = About(job.target, job.precision, self.max_length, self.options.command, self._weights_sha256)
        write_manifest(stage, self.checkpoint, about, lowered, parity, calibration)

    @functools.cached_property
    def _weights_sha256(self) -> str:
        return self.checkpoint.weights_sha256()
