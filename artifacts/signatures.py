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
from typing import Any

from ettin.artifacts.errors import MissingDependency, SignatureError, UsageError
from ettin.artifacts.folder import Folder
from ettin.artifacts.manifest import MANIFEST_NAME, Manifest

SIGNATURE_NAME = "model.sig"

MAX_SIGNATURE_BYTES = 4 << 20
_MAX_KEY_BYTES = 1 << 16
_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_MAKE_KEY = "Make one: openssl ecparam -genkey -name prime256v1 -noout -out key.pem"
_MAKE_PUBLIC = "Make it: openssl ec -in {} -pubout -out key.pub"
_SIGN_AGAIN = "Sign again: ettin-verify --sign KEY"

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
# What reading fields of JSON raises if they are missing or of another kind.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def read_private_key(path: Path) -> Any:
    """An elliptic-curve private key.

    Raises:
        UsageError: no such file, not such a key, or one with a password.
        MissingDependency: `cryptography` is not installed.
    """
    serialization, content = _serialization(), _key_bytes(path)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise UsageError(f"{path}: the key has a password. Give one without: openssl ec -in {path}") from None
    except Exception:  # cryptography raises several kinds
        raise UsageError(f"{path}: not a private key in PEM. {_MAKE_KEY}") from None
    _algorithm(key.public_key() if hasattr(key, "public_key") else None, path)
    return key


def read_public_key(path: Path) -> Any:
    """An elliptic-curve public key; raises as `read_private_key` does."""
    serialization, content = _serialization(), _key_bytes(path)
    if b"PRIVATE KEY" in content:
        raise UsageError(f"{path}: a private key, expected the public one. {_MAKE_PUBLIC.format(path)}")
    try:
        key = serialization.load_pem_public_key(content)
    except Exception:
        raise UsageError(f"{path}: not a public key in PEM. {_MAKE_PUBLIC.format('key.pem')}") from None
    _algorithm(key, path)
    return key


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
    signed = key.sign(_encoded(payload), _algorithm(key.public_key()))
    envelope = {
        "payload": _base64(payload),
        "payloadType": _PAYLOAD,
        "signatures": [{"sig": _base64(signed), "keyid": ""}],
    }
    material = {"publicKey": {"hint": _hint(key.public_key())}, "tlogEntries": []}
    bundle = {"mediaType": _BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return (json.dumps(bundle, indent=1) + "\n").encode()


def read_signature(opened: Folder, folder: Path) -> bytes | None:
    """Content of `model.sig` in an artifact's open folder, not verified; None: there is none."""
    try:
        return opened.read(SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SignatureError(f"{folder / SIGNATURE_NAME}: not a signature ({error.strerror})") from None


def signed_digests(content: bytes | None, manifest_bytes: bytes, public_key: Path, folder: Path) -> dict[str, str]:
    """SHA-256 by file, as the holder of a key signed it. Nothing of the content is used before it is verified.

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
        payload, signed, signer = _opened_bundle(content)
    except _MALFORMED as error:
        raise SignatureError(f"{path}: not a signature ({_in_short(error)}). {_SIGN_AGAIN}") from None
    if signer and signer != _hint(key):
        raise SignatureError(f"{path}: signed by another key than {public_key}. Don't use what you don't trust")
    try:
        key.verify(signed, _encoded(payload), _algorithm(key))
    except InvalidSignature:
        raise SignatureError(
            f"{path}: not signed by the key {public_key}, or changed since. Don't use what you don't trust"
        ) from None
    try:
        digests = _listed_digests(payload)
    except _MALFORMED as error:
        raise SignatureError(f"{path}: does not list files by SHA-256 ({_in_short(error)}). {_SIGN_AGAIN}") from None
    check_signed(digests, [(MANIFEST_NAME, _sha256(manifest_bytes))], folder)
    return digests


def check_signed(signed: dict[str, str], files: Iterable[tuple[str, str]], folder: Path) -> None:
    """Compares names and SHA-256 of files with the result of `signed_digests`; raises `SignatureError`."""
    for name, sha256 in files:
        if signed.get(name) != sha256:
            what = "was changed after it was signed" if name in signed else "was not signed"
            raise SignatureError(
                f"{folder / name}: {what}. If you changed it yourself, sign again: ettin-verify --sign KEY"
            )


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


def _algorithm(key: Any, path: Path | None = None) -> Any:
    """ECDSA with the hash that belongs to the key's curve; raises `UsageError` for another kind of key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    curve = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else "another kind"
    if curve not in _HASHES:
        raise UsageError(f"{path}: a key of {curve}, expected an elliptic-curve key of P-256. {_MAKE_KEY}")
    return ec.ECDSA(getattr(hashes, _HASHES[curve])())


def _hint(key: Any) -> str:
    """The name of a public key in model-signing."""
    serialization = _serialization()
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    return _sha256(key.public_bytes(serialization.Encoding.PEM, public))


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, which is what is signed."""
    return f"DSSEv1 {len(_PAYLOAD)} {_PAYLOAD} {len(payload)} ".encode() + payload


def _opened_bundle(content: bytes) -> tuple[bytes, bytes, object]:
    """Payload, its signature, and the name of the public key, if any. Other keys differ between versions."""
    bundle = json.loads(content)
    envelope = bundle["dsseEnvelope"]
    if (bundle["mediaType"], envelope["payloadType"]) != (_BUNDLE, _PAYLOAD):
        raise ValueError(f"expected {_BUNDLE} around {_PAYLOAD}")
    (signed,) = envelope["signatures"]
    signer = bundle["verificationMaterial"]["publicKey"].get("hint")
    return base64.b64decode(envelope["payload"]), base64.b64decode(signed["sig"]), signer


def _listed_digests(payload: bytes) -> dict[str, str]:
    """SHA-256 by file, from a payload that was verified."""
    statement = json.loads(payload)
    predicate = statement["predicate"]
    kind, resources = predicate["serialization"], predicate["resources"]
    if (statement["_type"], statement["predicateType"], kind["method"]) != (_STATEMENT, _PREDICATE, "files"):
        raise ValueError(f"expected {_PREDICATE} of files")
    if {kind["hash_type"], *(resource["algorithm"] for resource in resources)} != {"sha256"}:
        raise ValueError("expected sha256")
    return {resource["name"]: resource["digest"] for resource in resources}


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
