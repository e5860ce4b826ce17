"""Signatures over all files of an artifact, as the OpenSSF `model-signing` package writes and verifies them.

`model.sig` is a Sigstore bundle: a DSSE envelope around an in-toto statement that lists every file with its SHA-256,
signed with an elliptic-curve key. `model_signing verify key` accepts it, and what `model_signing sign key` wrote is
accepted here. That package brings 37 others; this needs `cryptography` alone.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from ettin.artifacts.errors import MissingDependency, SignatureError, UsageError
from ettin.artifacts.folder import Folder
from ettin.artifacts.manifest import MANIFEST_NAME, Manifest

_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_MAX_KEY_BYTES = 1 << 16
_MAKE_KEY = "Make one: openssl ecparam -genkey -name prime256v1 -noout -out key.pem"
_MAKE_PUBLIC = "Make it: openssl ec -in {} -pubout -out key.pub"


def read_private_key(path: Path) -> Any:
    """An elliptic-curve private key.

    Raises:
        UsageError: no such file, not such a key, or one with a password.
        MissingDependency: `cryptography` is not installed.
    """
    serialization = _serialization()
    content = _key_bytes(path)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise UsageError(f"{path}: the key has a password. Give one without: openssl ec -in {path}") from None
    except Exception:  # cryptography raises several kinds
        raise UsageError(f"{path}: not a private key in PEM. {_MAKE_KEY}") from None
    algorithm(key.public_key() if hasattr(key, "public_key") else None, path)
    return key


def read_public_key(path: Path) -> Any:
    """An elliptic-curve public key.

    Raises:
        UsageError: no such file, or not such a key.
        MissingDependency: `cryptography` is not installed.
    """
    serialization = _serialization()
    content = _key_bytes(path)
    if b"PRIVATE KEY" in content:
        raise UsageError(f"{path}: a private key, expected the public one. {_MAKE_PUBLIC.format(path)}")
    try:
        key = serialization.load_pem_public_key(content)
    except Exception:
        raise UsageError(f"{path}: not a public key in PEM. {_MAKE_PUBLIC.format('key.pem')}") from None
    algorithm(key, path)
    return key


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "cryptography":
            raise
        raise MissingDependency("a signature", "cryptography", "trust") from None
    return serialization


def _key_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: the key can't be read ({error.strerror}). {_MAKE_KEY}") from None


def algorithm(key: Any, path: Path | None = None) -> Any:
    """ECDSA with the hash that belongs to a key's curve.

    Raises:
        UsageError: another kind of key.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    curve = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else "another kind"
    if curve not in _HASHES:
        raise UsageError(f"{path}: a key of {curve}, expected an elliptic-curve key of P-256. {_MAKE_KEY}")
    return ec.ECDSA(getattr(hashes, _HASHES[curve])())


def hint(key: Any) -> str:
    """Names a public key, as model-signing does."""
    serialization = _serialization()
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, public)).hexdigest()


SIGNATURE_NAME = "model.sig"
_MAX_SIGNATURE_BYTES = 4 << 20

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


class _Read(BaseModel):
    """Keys that say nothing of what is signed are ignored: other versions of the format have others."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class _Signature(_Read):
    sig: Base64Bytes


class _Envelope(_Read):
    payload: Base64Bytes
    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    signatures: tuple[_Signature] = Field(strict=False)


class _PublicKey(_Read):
    hint: str | None = None


class _Material(_Read):
    public_key: _PublicKey = Field(alias="publicKey")


class _Bundle(_Read):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"] = Field(alias="mediaType")
    material: _Material = Field(alias="verificationMaterial")
    envelope: _Envelope = Field(alias="dsseEnvelope")


class _Serialization(_Read):
    method: Literal["files"]
    hash_type: Literal["sha256"]


class _Resource(_Read):
    name: str
    algorithm: Literal["sha256"]
    digest: str


class _Predicate(_Read):
    serialization: _Serialization
    resources: tuple[_Resource, ...]


class _Statement(_Read):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: Literal["https://model_signing/signature/v1.0"] = Field(alias="predicateType")
    predicate: _Predicate


def signature(manifest_bytes: bytes, manifest: Manifest, private_key: Path) -> bytes:
    """Content of `model.sig`: signs the manifest's bytes and the checksums that it lists.

    Args:
        manifest_bytes: content of `manifest.json`.
        manifest: the same, parsed; its files are there and have the checksums that it lists.
        private_key: PEM file with an elliptic-curve key (P-256, P-384 or P-521) without a password.

    Raises:
        UsageError: no such key.
        MissingDependency: `cryptography` is not installed.
    """
    key = read_private_key(private_key)
    digests = {entry.path: entry.sha256 for entry in manifest.files} | {MANIFEST_NAME: _sha256(manifest_bytes)}
    resources = [
        {"name": path, "algorithm": "sha256", "digest": digests[path]} for path in sorted(digests, key=PurePosixPath)
    ]
    root = _sha256(b"".join(bytes.fromhex(resource["digest"]) for resource in resources))
    serialization = {
        "method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE_NAME],
    }  # fmt: skip
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": manifest.full_name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE,
        "predicate": {"serialization": serialization, "resources": resources},
    }
    payload = json.dumps(statement).encode()
    signed = key.sign(_encoded(payload), algorithm(key.public_key()))
    envelope = {
        "payload": _base64(payload),
        "payloadType": _PAYLOAD_TYPE,
        "signatures": [{"sig": _base64(signed), "keyid": ""}],
    }
    material = {"publicKey": {"hint": hint(key.public_key())}, "tlogEntries": []}
    bundle = {"mediaType": _BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return (json.dumps(bundle, indent=1) + "\n").encode()


def read_signature(opened: Folder, folder: Path) -> bytes | None:
    """Content of `model.sig`, not verified; None: there is none.

    Args:
        opened: the artifact's folder.
        folder: its path, for errors.

    Raises:
        SignatureError: it can't be read, or is larger than a signature can be.
    """
    try:
        with opened.open(SIGNATURE_NAME) as file:
            content = file.read(_MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SignatureError(f"{folder / SIGNATURE_NAME}: not a signature ({error.strerror})") from None
    if len(content) > _MAX_SIGNATURE_BYTES:
        raise SignatureError(f"{folder / SIGNATURE_NAME}: not a signature (more than {_MAX_SIGNATURE_BYTES} bytes)")
    return content


def signed_digests(content: bytes | None, manifest_bytes: bytes, public_key: Path, folder: Path) -> dict[str, str]:
    """What the holder of a key has signed: SHA-256 by file. Nothing of the content is used before it is verified.

    Args:
        content: of `model.sig`; None: there is none.
        manifest_bytes: content of `manifest.json`, which must have been signed.
        public_key: PEM file with the public key that is trusted.
        folder: the artifact, for errors.

    Raises:
        SignatureError: no signature, not by this key, or of another manifest.
        UsageError: no such key.
        MissingDependency: `cryptography` is not installed.
    """
    key, path = read_public_key(public_key), folder / SIGNATURE_NAME
    if content is None:
        raise SignatureError(
            f"{folder}: not signed, but a key is given. Sign what you trust: ettin-verify {folder} --sign KEY"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        bundle = _Bundle.model_validate_json(content)
    except ValidationError as error:
        raise SignatureError(
            f"{path}: not a signature ({_first(error)}). Sign again: ettin-verify --sign KEY"
        ) from None
    envelope, signer = bundle.envelope, bundle.material.public_key.hint
    if signer and signer != hint(key):
        raise SignatureError(f"{path}: signed by another key than {public_key}. Don't use what you don't trust")
    try:
        key.verify(envelope.signatures[0].sig, _encoded(envelope.payload), algorithm(key))
    except InvalidSignature:
        raise SignatureError(
            f"{path}: not signed by the key {public_key}, or changed since. Don't use what you don't trust"
        ) from None
    try:
        resources = _Statement.model_validate_json(envelope.payload).predicate.resources
    except ValidationError as error:
        raise SignatureError(
            f"{path}: does not list files by SHA-256 ({_first(error)}). Sign again: ettin-verify --sign KEY"
        ) from None
    signed = {resource.name: resource.digest for resource in resources}
    check_signed(signed, [(MANIFEST_NAME, _sha256(manifest_bytes))], folder)
    return signed


def check_signed(signed: dict[str, str], files: Iterable[tuple[str, str]], folder: Path) -> None:
    """Compares files with what was signed.

    Args:
        signed: what `signed_digests` returned.
        files: names and SHA-256.
        folder: the artifact, for errors.

    Raises:
        SignatureError: names the first file that was changed or added after the signing.
    """
    for name, sha256 in files:
        if signed.get(name) != sha256:
            what = "was changed after it was signed" if name in signed else "was not signed"
            raise SignatureError(
                f"{folder / name}: {what}. If you changed it yourself, sign again: ettin-verify --sign KEY"
            )


def _encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _first(error: ValidationError) -> str:
    problem = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(str(part)[:40] for part in problem['loc']) or 'content'}: {problem['msg'][:200]}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
