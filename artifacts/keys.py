"""Elliptic-curve keys in PEM files, for signatures."""

import hashlib
from pathlib import Path
from typing import Any

from ettin.artifacts.errors import MissingDependency, UsageError

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
