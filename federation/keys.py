"""Signing keys as files: encrypted PKCS#8 beside their public half.

A key folder holds, for each key, ``<name>.pem`` (private, mode 0600, PKCS#8; encrypted unless the
passphrase is empty on purpose) and ``<name>.pub.json`` (public, in the notation of The Update
Framework). The public half carries the key's name, so that everything signed can be told to people
by name. A passphrase is an argument here; where it comes from (prompt, environment, file) is for
the caller to say, and a command line is never the place.

    >>> import tempfile, pathlib
    >>> folder = generate(pathlib.Path(tempfile.mkdtemp()), ["root-1", "root-2"], passphrase="open")
    >>> folder.names()
    ('root-1', 'root-2')
    >>> folder.signer("root-1", "open").public_key.keyid == folder.public("root-1").keyid
    True
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from securesystemslib.signer import (  # type: ignore[attr-defined]  # it has no __all__
    CryptoSigner,
    Key,
    Signer,
    SSlibKey,
)

from aggregation import durable
from federation.errors import FederationError

__all__ = [
    "ADAPTER_NAMES",
    "ONLINE_NAME",
    "ROOT_NAMES",
    "SCHEMES",
    "THRESHOLD",
    "CryptoSigner",
    "Key",
    "KeyFileError",
    "KeyFolder",
    "SSlibKey",
    "Signer",
    "generate",
    "is_encrypted",
    "key_name",
    "load_signer",
    "read_public",
]

NAME_FIELD = "x-airpeft-name"
SCHEMES = ("ed25519", "ecdsa-p256")
THRESHOLD = 2
ROOT_NAMES = ("root-1", "root-2", "root-3")
ADAPTER_NAMES = ("adapters-1", "adapters-2", "adapters-3")
ONLINE_NAME = "online"

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}\Z", re.ASCII)


class KeyFileError(FederationError):
    """A key that cannot be read, written or used; says which file and what to do."""


@dataclass(frozen=True)
class KeyFolder:
    """A folder of keys; reading it changes nothing."""

    path: Path

    def names(self) -> tuple[str, ...]:
        """Names of the keys in it, sorted."""
        return tuple(sorted(p.name.removesuffix(".pub.json") for p in self.path.glob("*.pub.json")))

    def public(self, name: str) -> SSlibKey:
        """The public half of a key.

        Raises:
            KeyFileError: no such key, or not a public key.
        """
        return read_public(self.path / f"{name}.pub.json")

    def signer(self, name: str, passphrase: str | None = None) -> CryptoSigner:
        """A key, ready to sign.

        Raises:
            KeyFileError: no such key, or the wrong passphrase.
        """
        return load_signer(self.path / f"{name}.pem", passphrase)

    def signers(self, prefix: str, passphrase: str | None = None) -> list[CryptoSigner]:
        """All keys whose name starts so, in order of their names.

        Raises:
            KeyFileError: there is none, or the wrong passphrase.
        """
        names = [name for name in self.names() if name.startswith(prefix)]
        if not names:
            raise KeyFileError(
                f"no key named {prefix}* in {self.path}; make keys with: airpeft keys init"
            )
        return [self.signer(name, passphrase) for name in names]


def generate(
    folder: Path,
    names: Iterable[str],
    *,
    scheme: str = "ed25519",
    passphrase: str | None = None,
) -> KeyFolder:
    """Make keys, one file pair for each name.

    Args:
        folder: where; it is made if it is missing (mode 0700).
        names: lower-case letters, digits and hyphens.
        scheme: ``ed25519`` or ``ecdsa-p256``.
        passphrase: encrypts the private files; None leaves them readable to whoever has the file.

    Raises:
        KeyFileError: a name is malformed or taken (a key is never overwritten), or an unknown
            scheme.
        StorageError: the folder cannot be written.
    """
    wanted = tuple(names)
    if scheme not in SCHEMES:
        raise KeyFileError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    for name in wanted:
        if not _NAME.match(name):
            raise KeyFileError(f"key name {name!r} must be lower-case letters, digits, hyphens")
        if (folder / f"{name}.pem").exists():
            raise KeyFileError(
                f"{folder / f'{name}.pem'} exists and is never overwritten: choose another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise durable.storage_error(folder, error) from error
    for name in wanted:
        _generate_one(folder, name, scheme, passphrase)
    return KeyFolder(folder)


def load_signer(path: Path, passphrase: str | None = None) -> CryptoSigner:
    """A private key file and the public half beside it, ready to sign.

    Args:
        path: a ``.pem`` file, PKCS#8.
        passphrase: None if the file is not encrypted.

    Raises:
        KeyFileError: no such file, wrong or missing passphrase, not a key that we use, or a public
            half that belongs to another key.
    """
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
    """Whether a private key file needs a passphrase.

    Raises:
        KeyFileError: no such file.
    """
    try:
        return _is_encrypted(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"cannot read the private key {path}: {error.strerror}") from error


def read_public(path: Path) -> SSlibKey:
    """The public half of a key.

    Raises:
        KeyFileError: no such file, or not a public key of a scheme that we use.
    """
    try:
        doc = json.loads(path.read_bytes())
        keyid = doc.pop("keyid")
        key = SSlibKey.from_dict(keyid, doc)
    except OSError as error:
        raise KeyFileError(f"cannot read the public key {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KeyFileError(f"{path} is not a public key: {error!r}") from None
    return key


def key_name(key: object) -> str:
    """What people call a key: the name it was made with, else the start of its identifier."""
    fields = getattr(key, "unrecognized_fields", {})
    name = fields.get(NAME_FIELD)
    if isinstance(name, str) and _NAME.match(name):
        return name
    return str(getattr(key, "keyid", "?"))[:12]


def _is_encrypted(pem: bytes) -> bool:
    return b"ENCRYPTED" in pem.split(b"\n", 1)[0]


def _generate_one(folder: Path, name: str, scheme: str, passphrase: str | None) -> None:
    private: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
    if scheme == "ed25519":
        private = ed25519.Ed25519PrivateKey.generate()
    else:
        private = ec.generate_private_key(ec.SECP256R1())
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        protection = serialization.BestAvailableEncryption(passphrase.encode())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    public = SSlibKey.from_crypto(private.public_key())
    public.unrecognized_fields[NAME_FIELD] = name
    doc = {"keyid": public.keyid, **public.to_dict()}
    # The public half goes last: a key without one is not listed, and never half used.
    durable.write_bytes(folder / f"{name}.pem", pem, mode=0o600)
    text = json.dumps(doc, indent=2, sort_keys=True) + "\n"
    durable.write_bytes(folder / f"{name}.pub.json", text.encode())
