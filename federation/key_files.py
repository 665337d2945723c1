"""One key's files: the private half as a signer, the public half with its name and its holder."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from securesystemslib.signer import (  # type: ignore[attr-defined]  # it has no __all__
    CryptoSigner,
    Key,
    Signer,
    SSlibKey,
)

from federation.bounded import read_bounded
from federation.errors import FederationError
from federation.signers import open_signer

MAX_PUBLIC = 64 << 10  # bytes
NAME_FIELD = "x-airpeft-name"
HOLDER_FIELD = "x-airpeft-holder"
SCHEMES = ("ed25519", "ecdsa-p256")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}\Z", re.ASCII)


class KeyFileError(FederationError):
    """A key that cannot be read, written or used; says which file and what to do."""


def load_signer(path: Path, passphrase: str | None = None) -> Signer:
    """A private key file and the public half beside it, ready to sign.

    Args:
        path: a ``.pem`` file, PKCS#8, or a ``.uri`` file.
        passphrase: None if the file is not encrypted; for a token, its PIN.

    Raises:
        KeyFileError: no such file, wrong or missing passphrase, not a key that we use, or a public
            half that belongs to another key.
        SignerError: a key by URI that can't be used.
    """
    if path.suffix == ".uri":
        return _by_uri(path, passphrase)
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"cannot read the private key {path}: {error.strerror}") from error
    encrypted = _is_encrypted(pem)
    if encrypted and not passphrase:
        raise KeyFileError(f"{path} is encrypted: give its passphrase")
    secret = passphrase.encode() if encrypted and passphrase else None
    try:
        private = serialization.load_pem_private_key(pem, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        why = "wrong passphrase, or a damaged file" if encrypted else "not a PKCS#8 private key"
        raise KeyFileError(f"cannot open the private key {path}: {why}") from None
    if not isinstance(private, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{path} is of another kind; allowed: {', '.join(SCHEMES)}")
    public = read_public(path.with_name(path.stem + ".pub.json"))
    try:
        return CryptoSigner(private, public)
    except Exception as error:
        raise KeyFileError(f"{path} does not belong to the .pub.json beside it: {error}") from None


def is_encrypted(path: Path) -> bool:
    """Whether a private key file needs a passphrase, or a token its PIN.

    Raises:
        KeyFileError: no such file.
    """
    try:
        data = path.read_bytes()
        return not data.startswith(b"command:") if path.suffix == ".uri" else _is_encrypted(data)
    except OSError as error:
        raise KeyFileError(f"cannot read the private key {path}: {error.strerror}") from error


def read_public(path: Path) -> SSlibKey:
    """The public half of a key: a ``.pub.json``, or PEM as other software writes it.

    Raises:
        KeyFileError: no such file, or not a public key of a scheme that we use.
    """
    try:
        data = read_bounded(path, MAX_PUBLIC)
        if data.lstrip().startswith(b"-----BEGIN"):
            return _from_pem(data, path)
        doc = json.loads(data)
        keyid = doc.pop("keyid")
        key = SSlibKey.from_dict(keyid, doc)
    except OSError as error:
        raise KeyFileError(f"cannot read the public key {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KeyFileError(f"{path} is not a public key: {error!r}") from None
    try:
        check_identifier(key)
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None
    return key


def check_identifier(key: Key) -> None:
    """Refuse a key that is not the one that its identifier names.

    An identifier is the digest of the key. If it could be anything, one key under two identifiers
    would count as two people, and another key under a known identifier would take somebody's place
    without anybody seeing it: whatever people compare, they compare identifiers.

    Raises:
        KeyFileError: it names another key, or the key is of a kind that we don't use.
    """
    public = key.keyval.get("public") if isinstance(key, SSlibKey) else None
    try:
        if not isinstance(public, str):
            raise TypeError("it has no public half")
        if key.keytype == "ed25519":
            found = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        elif key.keytype == "ecdsa":
            found = serialization.load_pem_public_key(public.encode())  # type: ignore[assignment]
        else:
            raise TypeError(f"kind {key.keytype!r}; allowed: {', '.join(SCHEMES)}")
        named = SSlibKey.from_crypto(found)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{key_name(key)} is not a public key that we use: {error}") from None
    if (named.keyid, named.scheme) != (key.keyid, key.scheme):
        raise KeyFileError(
            f"{key_name(key)} calls itself {key.keyid[:16]} ({key.scheme[:32]}), but it is the key "
            f"{named.keyid[:16]} ({named.scheme}): ask its holder for the .pub.json anew"
        )


def key_name(key: object) -> str:
    """What people call a key: the name it was made with, else the start of its identifier."""
    fields = getattr(key, "unrecognized_fields", {})
    name = fields.get(NAME_FIELD)
    if isinstance(name, str) and NAME.match(name):
        return name
    return str(getattr(key, "keyid", "?"))[:12]


def key_holder(key: object) -> str:
    """Who holds a key, as it was said when the key was made; empty if nothing was."""
    return str(getattr(key, "unrecognized_fields", {}).get(HOLDER_FIELD, ""))[:200]


def _by_uri(path: Path, passphrase: str | None) -> Signer:
    public = read_public(path.with_name(path.stem + ".pub.json"))
    try:
        uri = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read {path}: {error}") from error

    def secret(what: str) -> str:
        if not passphrase:
            raise KeyFileError(f"{path} needs its {what}")
        return passphrase

    return open_signer(uri, public, secret)


def _from_pem(data: bytes, path: Path) -> SSlibKey:
    try:
        found = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path} is not a public key: {error}") from None
    curve = getattr(getattr(found, "curve", None), "name", "")
    if not isinstance(found, ed25519.Ed25519PublicKey) and curve != "secp256r1":
        raise KeyFileError(f"{path} is of another kind; allowed: {', '.join(SCHEMES)}")
    return SSlibKey.from_crypto(found)


def _is_encrypted(pem: bytes) -> bool:
    return b"ENCRYPTED" in pem.split(b"\n", 1)[0]
