"""An export: read, rewrite, lower, verify, publish.

`Export.run` makes one artifact. It lowers the rewritten model (`writer.rewrite`) with the target's writer into a
workspace, verifies what was written in a process of its own, and publishes it when it has passed.
"""

import gc
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ettin.artifacts.errors import EttinError, OutputError, ParityError, UsageError
from ettin.artifacts.manifest import Calibration, Parity
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.parity import write_parity
from ettin.artifacts.publishing import NEW, check_output, staged, workspace
from ettin.artifacts.signatures import read_private_key
from ettin.artifacts.tolerances import FP16_MAX_ACTIVATION, REDUCED_RATIO
from ettin.export.options import Job, Options, Progress, Silent
from ettin.export.proof_pairs import proof_pairs
from ettin.export.quantise import LADDER, CalibrationText, Quantiser, calibration_text, linear_layers
from ettin.export.record import About, join, unverified, write_manifest
from ettin.export.reference import Gold, score_gold
from ettin.export.source.checkpoint import Checkpoint
from ettin.export.writer import Lowered, Model, Writer, can_be_proven, check_machine, rewrite, writer_for
from ettin.runtimes.tokenizer import PairTokenizer
from ettin.runtimes.verify import Verification, verify_in_child

_CALIBRATION_TOKENS = 1024
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 2}  # int8: embeddings are kept in bf16 or fp32


@dataclass
class Export:
    """Exports one checkpoint to any number of targets. It is read, scored by the reference and calibrated once.

    Args:
        checkpoint: what is exported.
        options: see `Options`.
        progress: see `Progress`.
    """

    checkpoint: Checkpoint
    options: Options
    progress: Progress = field(default_factory=Silent)
    _gold: Gold | None = None
    _proven: set[type[Writer]] = field(default_factory=set)  # their graph passed in fp32

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
        """Refuses what can be refused before any work.

        Raises:
            EttinError: an output that can't be written, a missing package, too little disk space.
        """
        _ = self.max_length
        if self.options.sign is not None:
            read_private_key(self.options.sign)
        if any(job.precision == "int8" for job in jobs):
            _ = self._calibration_text
        for job in jobs:
            check_output(job.output, self.options.force)
            check_machine(job.target, job.precision, self.options)
        if jobs:
            self._check_disk(jobs)

    def _check_disk(self, jobs: Sequence[Job]) -> None:
        need = sum(self.expected_bytes(job) * (1 if job.precision == "fp32" else 3) for job in jobs)
        folder = jobs[0].output.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < need:
            raise OutputError(
                f"{folder}: {free >> 20} MiB free, this export needs {need >> 20}. Choose another: --output DIR"
            )

    def expected_bytes(self, job: Job) -> int:
        """Size of the artifact, roughly: its weights."""
        return self.checkpoint.shape.num_parameters * _BYTES[job.precision]

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Scores the proof pairs of all jobs with the reference."""
        precisions = {job.precision for job in jobs}
        pairs = proof_pairs(self.options.verify_pairs, ranking="int8" in precisions and not self.checkpoint.is_random)
        with self.progress.step(f"score {len(pairs)} pairs with the reference"):
            self._gold = score_gold(
                self.checkpoint,
                pairs,
                self.max_length,
                with_bf16=bool(precisions & set(REDUCED_RATIO)),
                with_activations="fp16" in precisions,
            )

    def run_all(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Verification | EttinError | None]]:
        """Runs jobs by target, fp32 first: it proves the graph of the reduced precisions.

        Yields:
            Each job and what `run` returned, or why it failed.
        """
        if jobs:
            self.prepare(jobs)
        for job in sorted(jobs, key=lambda job: (job.target, job.precision != "fp32")):
            try:
                yield job, self.run(job)
            except EttinError as error:
                yield job, error

    def run(self, job: Job) -> Verification | None:
        """Makes, verifies and publishes one artifact.

        Returns:
            What was proven; None for one published without proof (`allow_unverified`).

        Raises:
            ParityError: the scores differ from gold; nothing was published.
            EttinError: anything else; nothing was published.
        """
        writer = writer_for(job.target, self.options)
        is_provable = can_be_proven(writer, job.precision, self.options)
        if self._gold is None:
            self.prepare([job])
        self._check_range(job)
        proof = writer.proof(job.precision)
        if job.precision != "fp32" and (is_provable or proof is not writer):
            self._prove_graph(proof, job)
        if job.precision == "int8":
            return self._run_int8(job, writer, is_provable)
        verification = self._publish(job, writer, self._model, is_provable)
        if job.precision == "fp32":
            self._proven.add(type(writer))
        return verification

    def run_together(self, jobs: Sequence[Job]) -> list[Verification | None]:
        """Makes one artifact of jobs that differ in precision and have the same output; each is verified by itself.

        Returns:
            What `run` returns, for each job.

        Raises:
            EttinError: as `run` does; nothing was published.
        """
        if self._gold is None:
            self.prepare(jobs)
        results = {}
        with staged(jobs[0].output, self.options.force) as stage:
            parts = {job.precision: replace(job, output=stage.parent / job.precision) for job in jobs}
            for precision in sorted(parts, key=lambda precision: precision != "fp32"):  # it proves the graph of others
                results[precision] = self.run(parts[precision])
            join(stage, [part.output for part in parts.values()], self.checkpoint)
            self._sign(stage)
        return [results[job.precision] for job in jobs]

    def _sign(self, stage: Path) -> None:
        if self.options.sign is not None:
            with OpenArtifact(stage) as artifact:
                artifact.sign(self.options.sign)

    def _run_int8(self, job: Job, writer: Writer, is_provable: bool) -> Verification | None:
        """Publishes with the first scheme of the ladder that passes."""
        text = self._calibration_text
        for scheme in LADDER:
            with self.progress.step(f"quantise {scheme.name}"):
                quantised = self._quantiser.quantised(scheme)
            layers = linear_layers(self.checkpoint.shape)
            calibration = Calibration(
                text=text.name,
                text_sha256=text.sha256,
                pairs=len(text.pairs),
                scheme=scheme.name,
                float_linears=tuple(name for name in layers if name not in quantised.input_max),
            )
            try:
                return self._publish(job, writer, replace(self._model, quantised=quantised), is_provable, calibration)
            except ParityError as error:
                if scheme is LADDER[-1]:
                    raise
                self.progress.note(f"int8 of {scheme.name} is not good enough: {error}")
        raise AssertionError("the ladder is empty")

    def _publish(
        self, job: Job, writer: Writer, model: Model, is_provable: bool, calibration: Calibration | None = None
    ) -> Verification | None:
        """Lowers into a workspace, verifies there, and gives the artifact its place."""
        verification = None
        with staged(job.output, self.options.force) as stage:
            with self.progress.step(f"write {job.target} {job.precision}"):
                lowered = self._lower(stage, writer, model, job.precision, calibration)
            for note in lowered.notes:
                self.progress.note(note)
            if is_provable:
                verification = self._verify(stage, writer, job.precision)
                self._record(stage, writer, job.precision, lowered, calibration, verification.parity)
            self._sign(stage)
        return verification

    def _prove_graph(self, writer: Writer, job: Job) -> None:
        """A reduced precision is made only from a graph that passed in fp32."""
        if type(writer) in self._proven:
            return
        with workspace(job.output) as folder:
            stage = folder / NEW
            stage.mkdir()
            with self.progress.step(f"write {writer.target.name} fp32, to prove the graph"):
                self._lower(stage, writer, self._model, "fp32", None)
            self._verify(stage, writer, "fp32")
        self._proven.add(type(writer))

    def _lower(
        self, stage: Path, writer: Writer, model: Model, precision: str, calibration: Calibration | None
    ) -> Lowered:
        lowered = writer.lower(model, precision, stage)
        assert self._gold is not None  # noqa: S101 (`run` has prepared it)
        write_parity(stage, self._gold.cases)
        self._record(stage, writer, precision, lowered, calibration, unverified())
        gc.collect()  # copies of a 1b's weights, before a child loads them again
        return lowered

    def _verify(self, stage: Path, writer: Writer, precision: str) -> Verification:
        with self.progress.step(f"verify {precision}"):
            verification = _passed(verify_in_child(stage))
        for environment in writer.environments(precision):
            words = " ".join(f"{key}={value}" for key, value in environment.items())
            with self.progress.step(f"verify {precision} with {words}"):
                verification = verification.joined(_passed(verify_in_child(stage, environment)))
        return verification

    def _record(
        self, stage: Path, writer: Writer, precision: str, lowered: Lowered, calibration: Calibration | None,
        parity: Parity,
    ) -> None:  # fmt: skip
        about = About(writer.target.name, precision, self.max_length, self.options.command, self._weights_sha256)
        write_manifest(stage, self.checkpoint, about, lowered, parity, calibration)

    def _check_range(self, job: Job) -> None:
        largest = self._gold.max_activation if self._gold else None
        if job.precision == "fp16" and (largest is None or largest > FP16_MAX_ACTIVATION):
            raise ParityError(
                f"fp16 ends at 65504, an activation of gold reaches {largest}, limit {FP16_MAX_ACTIVATION:.0f}. Export "
                f"another precision: --target {job.target} --precision fp32"
            )

    @cached_property
    def _model(self) -> Model:
        return rewrite(self.checkpoint, self.max_length)

    @cached_property
    def _calibration_text(self) -> CalibrationText:
        return calibration_text(self.options.calibration)

    @cached_property
    def _quantiser(self) -> Quantiser:
        tokenizer = PairTokenizer(self.checkpoint.folder / "tokenizer.json")
        sequences = self._calibration_text.sequences(tokenizer, min(self.max_length, _CALIBRATION_TOKENS))
        return Quantiser(self._model.weights, self.checkpoint.shape, sequences)

    @cached_property
    def _weights_sha256(self) -> str:
        return self.checkpoint.weights_sha256()


def _passed(verification: Verification) -> Verification:
    if not verification.ok:
        raise ParityError(
            f"{verification.runtime}: scores differ from the reference: {verification.summary}; limit: "
            f"{verification.parity.rule}; worst pair: {verification.worst_pair}. Nothing was published"
        )
    return verification
