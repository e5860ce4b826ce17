"""Calibrated scores: the fit, its figures, and how they are stored in an artifact."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support import rewrite

from ettin.artifacts.errors import InputError, ManifestError, SignatureError, UsageError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes import load
from ettin.runtimes.arguments import calibrated, sigmoid
from ettin.runtimes.calibration import fitted, reliability
from ettin.runtimes.commands.calibrate import command

Artifacts = dict[tuple[str, str], Path]
RNG = np.random.default_rng(7)


def drawn(count: int, slope: float, offset: float) -> tuple[np.ndarray, np.ndarray]:
    logits = RNG.normal(3, 6, count).astype(np.float32)
    return logits, RNG.random(count) < 1 / (1 + np.exp(-(slope * logits + offset)))


@pytest.mark.parametrize(("slope", "offset"), [(0.3, -2.0), (1.0, 0.0), (2.0, 4.0)])
def test_fit_finds_what_labels_were_drawn_from(slope: float, offset: float) -> None:
    fit = fitted(*drawn(40_000, slope, offset))
    assert fit.slope == pytest.approx(slope, rel=0.06) and fit.offset == pytest.approx(offset, abs=0.2)
    assert fit.after.expected_calibration_error < 0.01
    if slope != 1:
        assert fit.after.brier < fit.before.brier
        assert fit.before.expected_calibration_error > 3 * fit.after.expected_calibration_error


def test_fit_is_that_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    logits, labels = drawn(5000, 0.4, -1)
    found = linear.LogisticRegression(C=1e9, tol=1e-9).fit(logits[:, None].astype(np.float64), labels)
    fit = fitted(logits, labels)
    assert fit.slope == pytest.approx(found.coef_[0, 0], rel=5e-3)
    assert fit.offset == pytest.approx(found.intercept_[0], rel=2e-2)


def test_labels_that_logits_separate() -> None:
    logits = np.r_[RNG.normal(15, 1, 100), RNG.normal(-10, 1, 100)].astype(np.float32)
    fit = fitted(logits, logits > 0)
    assert 0 < fit.slope < 10 and fit.after.brier < 0.01


def test_fits_that_make_no_sense() -> None:
    logits, labels = drawn(1000, 1, 0)
    with pytest.raises(InputError, match="logits do not rise with relevance"):
        fitted(logits, ~labels)
    with pytest.raises(InputError, match="logits do not rise with relevance"):
        fitted(np.full(100, 3, np.float32), np.arange(100) % 2 == 0)
    with pytest.raises(InputError, match="1 of 1000 logits are not finite"):
        fitted(np.where(np.arange(1000) == 7, np.nan, logits).astype(np.float32), labels)
    with pytest.raises(InputError, match="19 relevant and 81 other pairs, expected at least 20 of each"):
        fitted(logits[:100], np.arange(100) < 19)


def test_reliability_by_hand() -> None:
    found = reliability(np.array([0.1, 0.1, 1.0, 0.6], np.float32), np.array([False, True, True, False]))
    assert found.brier == pytest.approx((0.01 + 0.81 + 0 + 0.36) / 4)
    assert found.expected_calibration_error == pytest.approx((0.8 + 0 + 0.6) / 4)


@pytest.fixture
def artifact(demo_artifacts: Artifacts, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_artifacts["onnx", "fp32"], tmp_path / "artifact"))


@pytest.fixture
def calibrate(tmp_path: Path) -> Callable[..., Result]:
    planets = ["Mercury", "Venus", "Mars", "Jupiter", "Saturn"]
    rows = [
        {"query": f"who wrote about {planet} in {year}", "document": f"{other} was described by a writer in {year}."}
        for year in range(1600, 1610)
        for planet in planets
        for other in planets
    ]
    labelled = [{**row, "label": int(row["query"].split()[3] in row["document"])} for row in rows]
    labelled[0]["label"] = 0  # labels are never perfect
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, labelled)))

    def run(*words: object) -> Result:
        return CliRunner().invoke(command, [str(word) for word in words])

    return run


def test_calibration_is_stored_and_used(artifact: Path, calibrate: Callable[..., Result], tmp_path: Path) -> None:
    before = Manifest.read(artifact)
    pair = ("who wrote about Mars in 1700", "Mars was described by a writer in 1700.")
    with load(artifact) as runtime, pytest.raises(UsageError, match="has no calibration. Fit one on labelled pairs"):
        runtime.predict(pair, activation_fn="calibrated")
    done = calibrate(artifact, tmp_path / "pairs.jsonl")
    assert done.exit_code == 0, (done.output, done.exception)
    manifest = Manifest.read(artifact)
    fit = manifest.score_calibration
    assert fit and fit.pairs == 250 and fit.relevant == 49 and fit.after.brier < fit.before.brier
    assert f"sigmoid({fit.slope:.4g} · logit" in done.output and f"{fit.after.brier:.4f}" in done.output
    assert manifest.model_copy(update={"score_calibration": None}) == before
    with load(artifact) as runtime:
        logits = runtime.predict([pair])
        scores = runtime.predict([pair], activation_fn="calibrated")
        np.testing.assert_allclose(scores, sigmoid(np.float32(fit.slope) * logits + np.float32(fit.offset)), rtol=1e-5)
        np.testing.assert_array_equal(scores, calibrated(fit, logits))
        (hit,) = runtime.rank(*pair[:1], [pair[1]], activation_fn="calibrated")
        assert hit["score"] == pytest.approx(float(scores[0]))


@pytest.mark.parametrize(
    "change", [{"slope": -1.0}, {"slope": 0.0}, {"slope": 1e300}, {"offset": "high"}, {"path": "/etc/passwd"}]
)
def test_hostile_calibration_is_refused(
    artifact: Path, calibrate: Callable[..., Result], tmp_path: Path, change: dict[str, object]
) -> None:
    assert calibrate(artifact, tmp_path / "pairs.jsonl").exit_code == 0
    rewrite(artifact, lambda fields: fields["score_calibration"].update(change))
    with pytest.raises(ManifestError, match="field 'score_calibration"):
        load(artifact)


def test_signed_artifacts_are_signed_again(artifact: Path, calibrate: Callable[..., Result], tmp_path: Path) -> None:
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization as form

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    with OpenArtifact(artifact) as opened:
        opened.sign(tmp_path / "key.pem")
    done = calibrate(artifact, tmp_path / "pairs.jsonl")
    assert "is signed, and its manifest changes. Sign it again: --sign KEY" in str(done.exception)
    with load(artifact, trusted_key=tmp_path / "key.pub"):
        pass  # as it was
    signing = ("--key", tmp_path / "key.pub", "--sign", tmp_path / "key.pem")
    assert calibrate(artifact, tmp_path / "pairs.jsonl", *signing).exit_code == 0
    with load(artifact, trusted_key=tmp_path / "key.pub") as runtime:
        assert runtime.manifest.score_calibration
    rewrite(artifact, lambda fields: fields["score_calibration"].update(slope=9.0))
    with pytest.raises(SignatureError):
        load(artifact, trusted_key=tmp_path / "key.pub")


@pytest.mark.parametrize(
    "line", ['{"query": "q"}', "[]", '{"query": "q", "document": "d", "label": 2}', "nonsense", '{"query": 1}']
)
def test_bad_pairs_are_said(artifact: Path, calibrate: Callable[..., Result], tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.jsonl").write_text(f'{{"query": "q", "document": "d", "label": 1}}\n\n{line}\n')
    done = calibrate(artifact, tmp_path / "bad.jsonl")
    assert isinstance(done.exception, InputError) and "bad.jsonl, line 3: expected {" in str(done.exception)


def test_ranking_uses_logits(demo_artifacts: Artifacts) -> None:
    """float32 sigmoids of logits above 16.6 are equal."""
    with load(demo_artifacts["onnx", "fp32"]) as runtime:
        runtime.scheduler._score = lambda batch: np.diff(batch.cu_seqlens).astype(np.float32) + 20
        hits = runtime.rank("q", ["a", "a a a", "a a"], activation_fn="sigmoid")
    assert [hit["corpus_id"] for hit in hits] == [1, 2, 0] and len({hit["score"] for hit in hits}) == 1
