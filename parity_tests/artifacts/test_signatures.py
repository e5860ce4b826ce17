"""Signatures: what a key vouches for, and that the package of the OpenSSF agrees."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import rewrite, run

from ettin.artifacts.errors import (
    ArtifactError,
    DamagedArtifact,
    EttinError,
    MissingDependency,
    SignatureError,
    UsageError,
)
from ettin.artifacts.files import list_files
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.signatures import SIGNATURE_NAME, read_private_key, read_public_key
from ettin.runtimes import load
from ettin.runtimes.loading import checked_manifest
from ettin.runtimes.triton.repository import TritonOptions, publish

ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
MODEL_SIGNING = shutil.which("model_signing")  # the OpenSSF's command, from whatever environment has it


def write_key(folder: Path, name: str = "key", curve: Any = ec.SECP256R1, password: bytes | None = None) -> Path:
    """`NAME.pem` and `NAME.pub`."""
    key = ec.generate_private_key(curve())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    private = folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    private.with_suffix(".pub").write_bytes(public)
    return private


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path)


@pytest.fixture
def artifact(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_artifacts["onnx", "fp32"], tmp_path / "artifact"))


def sign(artifact: Path, private_key: Path) -> None:
    with OpenArtifact(artifact) as opened:
        opened.sign(private_key)


def trusted(private_key: Path) -> Path:
    return private_key.with_suffix(".pub")


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_a_signed_artifact_loads_with_its_key(artifact: Path, tmp_path: Path, curve: Any) -> None:
    key = write_key(tmp_path, curve=curve)
    sign(artifact, key)
    with load(artifact, trusted_key=trusted(key)) as reranker:
        assert reranker.predict(("a", "b")).shape == ()
    load(artifact).close()  # who asks for no signature gets by without


def test_an_unsigned_artifact_is_refused_with_a_key(artifact: Path, key: Path) -> None:
    with pytest.raises(SignatureError, match="not signed, but a key is given. Sign what you trust: ettin-verify"):
        load(artifact, trusted_key=trusted(key))


def test_a_signature_by_another_key_is_refused(artifact: Path, key: Path, tmp_path: Path) -> None:
    other = write_key(tmp_path, "other")
    sign(artifact, other)
    with pytest.raises(SignatureError, match="signed by another key"):
        load(artifact, trusted_key=trusted(key))
    path = artifact / SIGNATURE_NAME
    content = json.loads(path.read_text())
    del content["verificationMaterial"]["publicKey"]["hint"]  # which anybody can write
    path.write_text(json.dumps(content))
    with pytest.raises(SignatureError, match="not signed by the key"):
        load(artifact, trusted_key=trusted(key))


def forge_score(artifact: Path) -> None:
    """Another reference score, with checksums that fit."""
    path = artifact / "parity.jsonl"
    path.write_text(path.read_text().replace('"gold":', '"gold": 1', 1))
    reseal(artifact)


def forge_manifest(artifact: Path) -> None:
    rewrite(artifact, lambda content: content.update(max_length_tokens=99))


def forge_weights(artifact: Path) -> None:
    path = artifact / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    reseal(artifact)


def reseal(artifact: Path) -> None:
    files = [entry.model_dump() for entry in list_files(artifact) if entry.path != SIGNATURE_NAME]
    rewrite(artifact, lambda content: content.update(files=files))


@pytest.mark.parametrize("forge", [forge_score, forge_manifest, forge_weights])
def test_what_was_forged_and_sealed_again_is_refused(artifact: Path, key: Path, forge: Callable[[Path], None]) -> None:
    """A checksum can be made again by anybody, a signature can't."""
    sign(artifact, key)
    forge(artifact)
    checked_manifest(artifact)  # the checksums are whole
    with pytest.raises(SignatureError, match=r"manifest\.json: was changed after it was signed"):
        load(artifact, trusted_key=trusted(key))


def test_a_changed_file_is_refused(artifact: Path, key: Path) -> None:
    sign(artifact, key)
    path = artifact / "onnx" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedArtifact):
        load(artifact, trusted_key=trusted(key))


def test_the_signature_of_another_artifact_is_refused(
    artifact: Path, key: Path, demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(demo_artifacts["onnx", "fp16"], tmp_path / "other"))
    sign(other, key)
    shutil.copy(other / SIGNATURE_NAME, artifact)
    with pytest.raises(SignatureError, match="was changed after it was signed"):
        load(artifact, trusted_key=trusted(key))


def test_no_checksums_and_a_key_contradict(artifact: Path, key: Path) -> None:
    sign(artifact, key)
    with pytest.raises(UsageError, match="proves nothing without checksums"):
        load(artifact, trusted_key=trusted(key), checksums=False)


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "{}", "\x00", "[" * 100_000, '{"mediaType": "x"}', "x" * (5 << 20)], ids=range(8)
)
def test_what_is_no_signature(artifact: Path, key: Path, content: str) -> None:
    (artifact / SIGNATURE_NAME).write_text(content)
    with pytest.raises(SignatureError, match="not a signature") as error:
        load(artifact, trusted_key=trusted(key))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_every_byte_of_the_envelope_counts(artifact: Path, key: Path) -> None:
    sign(artifact, key)
    path = artifact / SIGNATURE_NAME
    whole = json.loads(path.read_text())
    payload = whole["dsseEnvelope"]["payload"]
    for index in range(0, len(payload) - 4, len(payload) // 25):
        changed = payload[:index] + ("A" if payload[index] != "A" else "B") + payload[index + 1 :]
        whole["dsseEnvelope"]["payload"] = changed
        path.write_text(json.dumps(whole))
        with pytest.raises(SignatureError, match="not signed by the key"):
            load(artifact, trusted_key=trusted(key))


def test_a_linked_signature_is_refused(artifact: Path, key: Path) -> None:
    sign(artifact, key)
    (artifact / SIGNATURE_NAME).rename(artifact.parent / "elsewhere.sig")
    (artifact / SIGNATURE_NAME).symlink_to(artifact.parent / "elsewhere.sig")
    with pytest.raises(ArtifactError, match="not a signature"):
        load(artifact, trusted_key=trusted(key))


def test_bad_keys_are_one_line(artifact: Path, tmp_path: Path, key: Path) -> None:
    sign(artifact, key)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN PUBLIC KEY-----\nnothing\n-----END PUBLIC KEY-----\n")
    locked = write_key(tmp_path, "locked", password=b"secret")
    odd = write_key(tmp_path, "odd", curve=ec.SECP256K1)
    for call, message in (
        (lambda: load(artifact, trusted_key=tmp_path / "missing"), "the key can't be read"),
        (lambda: load(artifact, trusted_key=garbage), "not a public key in PEM"),
        (lambda: load(artifact, trusted_key=key), "a private key, expected the public one"),
        (lambda: read_public_key(trusted(odd)), "a key of secp256k1, expected an elliptic-curve key of P-256"),
        (lambda: read_private_key(trusted(key)), "not a private key in PEM"),
        (lambda: read_private_key(locked), "has a password"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_without_cryptography_it_is_one_line(artifact: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(artifact, key)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoCryptography(), *sys.meta_path])
    with pytest.raises(MissingDependency, match=r'a signature needs cryptography.*"ettin-export\[trust\]"'):
        load(artifact, trusted_key=trusted(key))
    load(artifact).close()


class _NoCryptography:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "cryptography":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_commands(artifact: Path, key: Path, tmp_path: Path) -> None:
    unsigned = run("ettin-rerank", artifact, "--query", "q", "--key", trusted(key), cwd=tmp_path, stdin="a\n")
    assert unsigned.returncode == 1 and "not signed, but a key is given" in unsigned.stderr
    signed = run("ettin-verify", artifact, "--sign", key, cwd=tmp_path)
    assert signed.returncode == 0 and f"signed: {SIGNATURE_NAME}" in signed.stdout, signed.stderr
    ranked = run("ettin-rerank", artifact, "--query", "q", "--key", trusted(key), cwd=tmp_path, stdin="a\n")
    assert ranked.returncode == 0, ranked.stderr
    verified = run("ettin-verify", artifact, "--key", trusted(key), cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr


def test_what_verification_changes_must_be_signed_again(artifact: Path, key: Path, tmp_path: Path) -> None:
    rewrite(artifact, lambda content: content["parity"].update(status="unverified", pairs=0))
    sign(artifact, key)
    verified = run("ettin-verify", artifact, "--key", trusted(key), cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert "the signature no longer fits the manifest. Sign again: ettin-verify" in verified.stderr
    with pytest.raises(SignatureError, match="was changed after it was signed"):
        load(artifact, trusted_key=trusted(key))
    assert run("ettin-verify", artifact, "--sign", key, cwd=tmp_path).returncode == 0
    load(artifact, trusted_key=trusted(key)).close()


def test_an_export_is_signed(key: Path, tmp_path: Path, export_here: Callable[..., Any]) -> None:
    options = ("--target", "onnx", "--precision", "fp32", "--max-length", "64")
    done = export_here("--size", "demo", *options, "--sign", key)
    assert done.returncode == 0, done.stderr
    load(tmp_path / done.stdout.strip(), trusted_key=trusted(key)).close()
    bad = export_here("--size", "demo", "--sign", "missing.pem", "--output", "out")
    assert bad.returncode == 1 and "the key can't be read" in bad.stderr and "score" not in bad.stderr


def test_a_triton_repository_keeps_the_signature(artifact: Path, key: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient")
    options = TritonOptions(trusted_key=trusted(key))
    with pytest.raises(SignatureError):
        publish(artifact, tmp_path / "models", "demo", options)
    sign(artifact, key)
    version = publish(artifact, tmp_path / "models", "demo", options)
    load(tmp_path / "models" / "demo" / str(version) / "artifact", trusted_key=trusted(key)).close()
    assert str(trusted(key)) in (tmp_path / "models" / "demo" / "config.pbtxt").read_text()


def model_signing(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [str(MODEL_SIGNING), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(MODEL_SIGNING is None, reason="needs model-signing and pyopenssl")
def test_model_signing_accepts_ours_and_ours_accepts_its(artifact: Path, key: Path) -> None:
    path = artifact / SIGNATURE_NAME
    card = artifact / "README.md"  # not covered
    check = ("verify", "key", artifact, "--signature", path, "--public_key", trusted(key), "--ignore-paths", card)
    sign(artifact, key)
    ours = model_signing(*check)
    assert ours.returncode == 0, ours.stdout + ours.stderr
    card.write_text("changed")
    assert model_signing(*check).returncode == 0
    (artifact / "parity.jsonl").write_text("changed")
    assert model_signing(*check).returncode != 0
    with pytest.raises(EttinError):
        checked_manifest(artifact, trusted(key))
    reseal(artifact)
    made = model_signing("sign", "key", artifact, "--signature", path, "--private_key", key)
    assert made.returncode == 0, made.stdout + made.stderr
    assert checked_manifest(artifact, trusted(key)) == Manifest.read(artifact)
    rewrite(artifact, lambda content: content.update(max_length_tokens=99))
    with pytest.raises(SignatureError):
        checked_manifest(artifact, trusted(key))


def test_native_model_of_triton_checks_the_signature(
    artifact: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tritonclient.grpc.model_config_pb2", reason='needs pip install "ettin-export[triton]"')
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    module = importlib.import_module("ettin.runtimes.triton.model")
    monkeypatch.delitem(sys.modules, "ettin.runtimes.triton.model")
    sign(artifact, key)
    public = key.with_suffix(".pub")
    publish(artifact, tmp_path / "models", "m", TritonOptions(native=True, trusted_key=public))
    folder, parameters = (
        tmp_path / "models" / "m" / "1" / "artifact",
        {"engine": "m-engine", "trusted_key": str(public)},
    )
    module.NativeModel()._load(folder, "1", parameters)
    (folder / SIGNATURE_NAME).unlink()
    with pytest.raises(SignatureError):
        module.NativeModel()._load(folder, "1", parameters)
