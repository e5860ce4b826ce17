"""Proves an artifact's scores: the reference's pairs through the runtime that users will run. No torch needed."""

import ctypes
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import ArtifactError, EttinError, ParityError
from ettin.artifacts.manifest import Manifest, Parity
from ettin.artifacts.metrics import ScoreError, score_error
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.parity import ParityCase, read_parity
from ettin.artifacts.precisions import in_precision, precisions, with_parity
from ettin.artifacts.tolerances import FP32, MIN_PAIRS, REDUCED_MIN_PAIRS, fp32_rule, int8_rule, reduced_rule
from ettin.runtimes.base import Runtime
from ettin.runtimes.batch import Batch
from ettin.runtimes.loading import check_kit, engine_module, load

_MIXED_PAIRS = 12  # scored together and alone
_MIXED_TOKENS = 768  # … where they are no longer than this
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Args:
        ok: within the tolerance, all of it.
        parity: what the manifest records of it; meaningful as proof only if `ok`.
        worst_pair: the pair with the largest |Δ| and both scores, in words.
        runtime: what really ran.
        unproven: see `Runtime.unproven_arithmetic`.
        artifact: digest of the manifest that was verified.
    """

    ok: bool
    parity: Parity
    worst_pair: str
    runtime: str
    unproven: Arithmetic | None
    artifact: str

    @property
    def summary(self) -> str:
        """One line."""
        parity = self.parity
        rank = "not defined" if parity.spearman is None else f"{parity.spearman:.6f}"
        drop = "" if isinstance(parity.quality, str) else f", nDCG@10 drop {parity.quality['ndcg10_drop']:.4f}"
        return (
            f"{parity.pairs} pairs, max |Δ| {_figure(parity.max_abs_error, '.2e')}, mean |Δ| "
            f"{_figure(parity.mean_abs_error, '.2e')}, Spearman {rank}, batch against single "
            f"{_figure(parity.batch_max_abs_error, '.1e')}{drop}"
        )

    def joined(self, other: Self) -> Self:
        """This, and that the other arithmetic passed too."""
        return replace(self, parity=_with_arithmetic(self.parity, other.parity))


_JSON: TypeAdapter[Verification] = TypeAdapter(Verification)


def _figure(value: float | None, form: str) -> str:
    """An error in words; the manifest has null for one that is not finite."""
    return "inf" if value is None else format(value, form)


def verify(
    folder: Path, *, device: str | None = None, threads: int | None = None, unproven: bool = False,
    trusted_key: Path | None = None, precision: str | None = None,
) -> Verification:  # fmt: skip
    """Runs the artifact's own pairs and compares ids and scores with the reference's.

    Args:
        folder: the artifact.
        device: see `load`.
        threads: see `load`.
        unproven: in the fastest arithmetic that this machine has; else in what `load` takes. There is no other for an
            unverified artifact.
        trusted_key: see `load`.
        precision: see `load`.

    Raises:
        ArtifactError: the artifact can't be used.
        ParityError: its tokenizer gives other ids than the reference's.
    """
    cases = read_parity(folder, trusted_key)
    if len(cases) < MIN_PAIRS:
        raise ParityError(f"{folder}: {len(cases)} parity pairs, expected at least {MIN_PAIRS}. Export again.")
    recorded = in_precision(Manifest.read(folder), precision).parity
    unproven = unproven or recorded.status == "unverified"
    with load(
        folder, device=device, threads=threads, allow_unverified=unproven, trusted_key=trusted_key, precision=precision
    ) as runtime:
        _check_ids(runtime, cases)
        scores = _scores(runtime, cases)
        alone, together = _mixed(runtime, cases)
        ok, rule, error, quality = _judged(runtime.manifest, cases, scores)
        is_finite = bool(np.isfinite(together).all())
        batch_error = float(np.abs(alone - together).max()) if is_finite else None
        if runtime.manifest.precision == "fp32":
            ok = ok and bool((np.abs(alone - together) <= FP32 * np.maximum(1, np.abs(alone))).all())
            rule += ", in any batch"
        parity = Parity(
            status="verified",
            pairs=len(cases),
            max_abs_error=_finite(error.max_abs),
            mean_abs_error=_finite(error.mean_abs),
            spearman=error.spearman,
            batch_max_abs_error=batch_error,
            arithmetic=(runtime.arithmetic,),
            reference=recorded.reference,
            rule=rule,
            quality=quality or "not-applicable",
        )
        return Verification(
            ok=ok and is_finite,
            parity=parity,
            worst_pair=_described(cases[error.worst], float(scores[error.worst])),
            runtime=runtime.description,
            unproven=runtime.unproven_arithmetic,
            artifact=runtime.manifest.digest,
        )


def _finite(error: float) -> float | None:
    return error if np.isfinite(error) else None


def verify_in_child(folder: Path, environment: Mapping[str, str] | None = None) -> Verification:
    """`verify` in a process of its own, with `environment` added to this one's.

    Engines can die instead of raising (OpenVINO 2026.4.1 has a SIGFPE, see the changelog), and the exporter's
    memory is not the user's: what is measured here is a process that never imported torch.

    Raises:
        ParityError: it found the artifact unusable, or died.
    """
    command = [sys.executable, "-m", "ettin.runtimes.verify", str(folder), str(os.getpid())]
    variables = {**os.environ, **(environment or {})}
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if child.returncode == 0:
        return _JSON.validate_json(child.stdout.splitlines()[-1], strict=False)
    if child.returncode < 0:
        raise ParityError(f"{folder.name}: the engine died with signal {-child.returncode} while it was verified")
    reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
    raise ParityError(f"{folder.name}: can't be verified: {reason.removeprefix('error: ')}")


def record_verified(folder: Path, verification: Verification) -> None:
    """Marks an unverified artifact as verified; of a verified one, records the arithmetic that passed here, too.

    Raises:
        ArtifactError: another artifact is there by now.
        OutputError: the manifest can't be written.
    """
    with OpenArtifact(folder) as artifact:
        whole = artifact.whole_manifest
        for manifest in (in_precision(whole, precision) for precision in precisions(whole)):
            if manifest.digest == verification.artifact:
                recorded = _recorded(manifest, verification)
                return artifact.replace_manifest(with_parity(whole, manifest.precision, recorded))
        raise ArtifactError(f"{folder}: was replaced while it was verified. Run again: ettin-verify {folder}")


def _recorded(manifest: Manifest, verification: Verification) -> Parity:
    if manifest.parity.status == "unverified":
        return verification.parity
    return _with_arithmetic(manifest.parity, verification.parity)


def _with_arithmetic(parity: Parity, other: Parity) -> Parity:
    """`parity`, which also names the arithmetic that `other` was proven in."""
    return parity.model_copy(update={"arithmetic": tuple(dict.fromkeys((*parity.arithmetic, *other.arithmetic)))})


def adopt_engine(folder: Path, trusted_key: Path | None = None) -> bool:
    """Makes a build kit whose engine was built an artifact, still unverified. A signature of the kit no longer fits.

    Args:
        folder: the kit.
        trusted_key: see `load`; whose signature the kit must have.

    Returns:
        False for anything that is not a build kit.

    Raises:
        UnverifiedArtifact: its engine is not there yet.
        MissingDependency: the engine's package, whose version is recorded, is not installed.
    """
    with OpenArtifact(folder, trusted_key=trusted_key) as artifact:
        manifest = artifact.manifest
        if not manifest.is_build_kit:
            return False
        built = artifact.listing(manifest.entry)
        if built is None:
            check_kit(folder, manifest)
            return False
        version = str(engine_module(manifest).__version__)
        needs = manifest.needs.model_copy(update={"version": version})
        artifact.replace_manifest(manifest.model_copy(update={"needs": needs, "files": (*manifest.files, built)}))
        return True


def _check_ids(runtime: Runtime, cases: list[ParityCase]) -> None:
    for case in cases:
        found = runtime.tokenizer.pairs([(case.query, case.document)], case.max_length)[0].tolist()
        if found != case.ids:
            at = next((at for at, (a, b) in enumerate(zip(found, case.ids, strict=False)) if a != b), "its end")
            raise ParityError(
                f"{runtime.folder}: token ids of {case.query[:40]!r} differ from the reference's at {at} "
                f"({len(found)} ids, expected {len(case.ids)}). The tokenizer is not the checkpoint's"
            )


def _scores(runtime: Runtime, cases: list[ParityCase]) -> NDArray[np.float32]:
    by_length = defaultdict(list)
    for at, case in enumerate(cases):
        by_length[case.max_length].append(at)
    scores = np.empty(len(cases), np.float32)
    for max_length, chosen in by_length.items():
        pairs = [(cases[at].query, cases[at].document) for at in chosen]
        scores[chosen] = runtime.predict(pairs, activation_fn="identity", max_length=max_length)
    return scores


def _mixed(runtime: Runtime, cases: list[ParityCase]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores of cases spread over all lengths, alone and in one padded batch."""
    pad = runtime.manifest.tokenizer.pad_token_id
    by_length = sorted((case.ids for case in cases if len(case.ids) <= _MIXED_TOKENS), key=len)
    chosen = np.unique(np.linspace(0, len(by_length) - 1, _MIXED_PAIRS).round().astype(int))
    sequences = [np.array(by_length[at], np.int32) for at in chosen]
    alone = np.concatenate([runtime.score(Batch.of([each], pad)) for each in sequences])
    return alone, runtime.score(Batch.of(sequences, pad))


def _judged(
    manifest: Manifest, cases: list[ParityCase], scores: NDArray[np.float32]
) -> tuple[bool, str, ScoreError, dict[str, float] | None]:
    gold = [case.gold for case in cases]
    if manifest.precision == "fp32":
        return *fp32_rule(scores, gold), None
    if manifest.precision == "int8" and manifest.source.weights == "random":
        # Random weights say nothing about int8: measured correlations were 0.98 where trained ones have 0.9998.
        rule = "random weights: token ids equal the reference's, scores are finite; accuracy is not judged"
        return bool(np.isfinite(scores).all()), rule, score_error(scores, gold), None
    if manifest.precision == "int8":
        return int8_rule(scores, gold, [case.query for case in cases])
    if len(cases) < REDUCED_MIN_PAIRS:
        raise ParityError(f"{len(cases)} pairs, expected at least {REDUCED_MIN_PAIRS} for {manifest.precision}")
    baseline = [case.torch_bf16 for case in cases if case.torch_bf16 is not None]
    if len(baseline) != len(cases):
        raise ParityError(
            f"precision '{manifest.precision}' is judged against PyTorch bf16, whose scores are missing. Export again."
        )
    return *reduced_rule(manifest.precision, scores, gold, baseline), None


def _described(case: ParityCase, score: float) -> str:
    pair = f"{case.query[:60]!r} × {case.document[:60]!r}"
    return f"{pair} ({len(case.ids)} tokens): {score:.6f}, gold {case.gold:.6f}"


def _end_with(parent: int) -> None:
    """Lets the kernel end this process with its parent, however that ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        sys.exit("error: the export that asked for this has ended")


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    try:
        print(_JSON.dump_json(verify(Path(sys.argv[1]))).decode())  # noqa: T201 (read by verify_in_child)
    except EttinError as error:
        sys.exit(f"error: {error}")
