"""Encrypting a release where it is made, and wrapping its key to devices that come later.

The content key of a release is made where the release is made and lives for the length of that
command. What stays of it is wrapped: to each device that is enrolled by then, and to *sealing
keys*, X25519 keys that people keep as they keep signing keys. With one of these, a device that was
enrolled later is given its key, on a machine of that person's choice. Neither the server, nor a
signer, nor the folder of the request has anything that opens a payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from aggregation import durable, payload, sealed
from federation.errors import FederationError
from protos.signed import ReleaseStatement, Seal
from protos.wraps import WrapError, Wraps, unwrap

PUBLIC_SUFFIX = ".pub.pem"


class SealingError(FederationError):
    """A sealing key that can't be used, or a payload that is not what is said of its seal."""


@dataclass(frozen=True)
class SealTo:
    """Who shall be able to read a release.

    Attributes:
        sealing_keys: public halves, 32 bytes each; at least one.
        readers: public encryption keys by device.
    """

    sealing_keys: tuple[bytes, ...]
    readers: Mapping[str, bytes]

    def __post_init__(self) -> None:
        if not self.sealing_keys:
            raise SealingError(
                "without a sealing key no device could ever be added: give --encrypt FILE.pub.pem, "
                "made with: airpeft keys sealing FILE.pem"
            )


def sealed_payload(
    encoded: payload.Payload, to: SealTo, key: bytes
) -> tuple[payload.Payload, Seal, Wraps]:
    """A payload encrypted, with what is signed of its seal, and its wrapped keys.

    Args:
        encoded: the payload as devices decode it.
        to: who can read it.
        key: a fresh content key (:func:`aggregation.sealed.new_key`).

    Raises:
        SealingError: a recipient's key is none that one can wrap to.
    """
    data = sealed.seal(encoded.data, key)
    digest = payload.digest_of(data)
    try:
        wraps = Wraps.to(key, digest, [*to.sealing_keys, *to.readers.values()])
    except WrapError as error:
        raise SealingError(str(error)) from None
    out = replace(encoded, data=data, sha256=digest, length=len(data))
    return out, Seal(check=sealed.key_check(key)), wraps


def more_wraps(
    wraps: Wraps, seal: Seal, private: X25519PrivateKey, publics: Iterable[bytes]
) -> Wraps:
    """The content key wrapped to those who lack it.

    Args:
        wraps: what there is.
        seal: as signed, so that no other key is handed out.
        private: a sealing key that the release was made with.
        publics: who shall be able to read it.

    Raises:
        SealingError: this sealing key does not open the release.
    """
    mine = wraps.find(private.public_key().public_bytes_raw())
    if mine is None:
        raise SealingError(
            f"this sealing key was not among those that {wraps.sha256[:12]}… was encrypted to: use "
            "one that was"
        )
    try:
        key = unwrap(mine, private, wraps.sha256)
        if not sealed.is_right(key, seal.check):
            raise SealingError(
                f"the key that was wrapped for {wraps.sha256[:12]}… is not the one that was signed"
            )
        return Wraps.to(key, wraps.sha256, [one for one in publics if wraps.find(one) is None])
    except WrapError as error:
        raise SealingError(str(error)) from None


def check_seal(statement: ReleaseStatement, data: bytes) -> None:
    """Refuse a payload that is encrypted without saying so, or the other way round.

    Raises:
        SealingError: it is one of these, or has a length that no encrypted payload has.
    """
    if sealed.is_sealed(data) != (statement.seal is not None):
        said = "encrypted" if statement.seal is not None else "plain"
        raise SealingError(f"{statement.name} is signed as {said}, and its payload is not")
    if statement.seal is not None:
        try:
            sealed.plain_length(len(data))
        except sealed.SealError as error:
            raise SealingError(f"{statement.name}: {error}") from None


def make_sealing_key(path: Path, passphrase: str | None) -> Path:
    """Make a sealing key: the private half in ``path``, the public half beside it.

    Args:
        path: a new ``.pem`` file; PKCS#8, mode 0600.
        passphrase: encrypts it; None leaves it as it is, for trials.

    Returns:
        The file of the public half, ``<name>.pub.pem``.

    Raises:
        SealingError: one of the files exists.
        StorageError: they cannot be written.
    """
    public = path.with_name(path.stem + PUBLIC_SUFFIX)
    for file in (path, public):
        if file.exists():
            raise SealingError(f"{file} exists: a key is never overwritten; choose another name")
    key = X25519PrivateKey.generate()
    secret: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        secret = serialization.BestAvailableEncryption(passphrase.encode())
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    durable.write_bytes(path, key.private_bytes(pem, form, secret), mode=0o600)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    durable.write_bytes(public, key.public_key().public_bytes(pem, spki))
    return public


def load_sealing_key(path: Path, passphrase: str | None) -> X25519PrivateKey:
    """The private half of a sealing key.

    Raises:
        SealingError: no such file, a wrong or missing passphrase, or another kind of key.
    """
    try:
        secret = passphrase.encode() if passphrase else None
        key = serialization.load_pem_private_key(path.read_bytes(), secret)
    except OSError as error:
        raise SealingError(f"cannot read the sealing key {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SealingError(
            f"cannot open the sealing key {path}: wrong or missing passphrase, or a damaged file"
        ) from None
    if not isinstance(key, X25519PrivateKey):
        raise SealingError(f"{path} is not an X25519 key: make one with: airpeft keys sealing")
    return key


def read_sealing_public(path: Path) -> bytes:
    """The public half of a sealing key, 32 bytes.

    Raises:
        SealingError: no such file, or another kind of key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise SealingError(f"cannot read the sealing key {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SealingError(
            f"{path} is not a public key in PEM: give the .pub.pem that airpeft keys sealing wrote"
        ) from None
    if not isinstance(key, X25519PublicKey):
        raise SealingError(f"{path} is not an X25519 key: make one with: airpeft keys sealing")
    return key.public_bytes_raw()
