"""Signing keys as files: encrypted PKCS#8 beside their public half.

A key folder holds, for each key, ``<name>.pem`` (private, mode 0600, PKCS#8; encrypted unless the
passphrase is empty on purpose) and ``<name>.pub.json`` (public, in the notation of The Update
Framework). Where the private half is somewhere else, ``<name>.uri`` says how to sign with it
(:mod:`federation.signers`). The public half carries the key's name and who holds it, so that
everything signed can be told to people by name. A passphrase is an argument here; where it comes
from (prompt, environment, file) is for the caller to say, and a command line is never the place.

    >>> import tempfile, pathlib
    >>> place = tempfile.TemporaryDirectory()
    >>> folder = generate(pathlib.Path(place.name), ["root-1", "root-2"], passphrase="open")
    >>> folder.names()
    ('root-1', 'root-2')
    >>> folder.signer("root-1", "open").public_key.keyid == folder.public("root-1").keyid
    True
    >>> place.cleanup()
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
from federation.key_files import (
    HOLDER_FIELD,
    NAME,
    NAME_FIELD,
    SCHEMES,
    KeyFileError,
    is_encrypted,
    key_holder,
    key_name,
    load_signer,
    read_public,
)

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
    "adopt",
    "generate",
    "is_encrypted",
    "key_holder",
    "key_name",
    "load_signer",
    "read_public",
]

THRESHOLD = 2
ROOT_NAMES = ("root-1", "root-2", "root-3")
ADAPTER_NAMES = ("adapters-1", "adapters-2", "adapters-3")
ONLINE_NAME = "online"


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

    def private(self, name: str) -> Path:
        """The file that one signs with: ``<name>.pem``, or ``<name>.uri``."""
        uri = self.path / f"{name}.uri"
        return uri if uri.is_file() else self.path / f"{name}.pem"

    def find(self, keyid: str) -> str | None:
        """The name of a key, by its identifier; None if it is not here."""
        return next((name for name in self.names() if self.public(name).keyid == keyid), None)

    def signer(self, name: str, passphrase: str | None = None) -> Signer:
        """A key, ready to sign.

        Raises:
            KeyFileError: no such key, or the wrong passphrase.
            SignerError: a key by URI that can't be used.
        """
        return load_signer(self.private(name), passphrase)

    def signers(self, prefix: str, passphrase: str | None = None) -> list[Signer]:
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
    holders: Mapping[str, str] | None = None,
) -> KeyFolder:
    """Make keys, one file pair for each name.

    Args:
        folder: where; it is made if it is missing (mode 0700).
        names: lower-case letters, digits and hyphens.
        scheme: ``ed25519`` or ``ecdsa-p256``.
        passphrase: encrypts the private files; None leaves them readable to whoever has the file.
        holders: who holds a key, by its name; for people, and public.

    Raises:
        KeyFileError: a name is malformed or taken (a key is never overwritten), or an unknown
            scheme.
        StorageError: the folder cannot be written.
    """
    wanted = tuple(names)
    if scheme not in SCHEMES:
        raise KeyFileError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    for name in wanted:
        _check_free(folder, name)
    _make_folder(folder)
    for name in wanted:
        _generate_one(folder, name, scheme, passphrase, (holders or {}).get(name, ""))
    return KeyFolder(folder)


def adopt(folder: Path, name: str, key: SSlibKey, uri: str, *, holder: str = "") -> KeyFolder:
    """Note a key whose private half is somewhere else.

    Args:
        folder: where; it is made if it is missing (mode 0700).
        name: lower-case letters, digits and hyphens.
        key: the public half.
        uri: how to sign with it (:mod:`federation.signers`).
        holder: who holds it; for people, and public.

    Raises:
        KeyFileError: the name is malformed or taken.
        StorageError: the folder cannot be written.
    """
    _check_free(folder, name, key)
    _make_folder(folder)
    durable.write_bytes(folder / f"{name}.uri", f"{uri}\n".encode(), mode=0o600)
    _write_public(folder, name, key, holder)
    return KeyFolder(folder)


def _check_free(folder: Path, name: str, key: SSlibKey | None = None) -> None:
    if not NAME.match(name):
        raise KeyFileError(f"key name {name!r} must be lower-case letters, digits, hyphens")
    public = folder / f"{name}.pub.json"
    ours = key is not None and public.exists() and read_public(public).keyid == key.keyid
    for path in (folder / f"{name}.pem", folder / f"{name}.uri", public):
        if path.exists() and not (path == public and ours):
            raise KeyFileError(
                f"{path} exists and is never overwritten: choose another folder or name"
            )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise durable.storage_error(folder, error) from error


def _generate_one(
    folder: Path, name: str, scheme: str, passphrase: str | None, holder: str
) -> None:
    private: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
    if scheme == "ed25519":
        private = ed25519.Ed25519PrivateKey.generate()
    else:
        private = ec.generate_private_key(ec.SECP256R1())
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        protection = serialization.BestAvailableEncryption(passphrase.encode())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    # The public half goes last: a key without one is not listed, and never half used.
    durable.write_bytes(folder / f"{name}.pem", pem, mode=0o600)
    _write_public(folder, name, SSlibKey.from_crypto(private.public_key()), holder)


def _write_public(folder: Path, name: str, public: SSlibKey, holder: str) -> None:
    public.unrecognized_fields[NAME_FIELD] = name
    if holder:
        public.unrecognized_fields[HOLDER_FIELD] = holder
    doc = {"keyid": public.keyid, **public.to_dict()}
    text = json.dumps(doc, indent=2, sort_keys=True) + "\n"
    durable.write_bytes(folder / f"{name}.pub.json", text.encode())
