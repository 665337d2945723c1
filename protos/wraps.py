r"""Content keys on their way to devices: each wrapped to one device's encryption key, by HPKE.

Hybrid Public Key Encryption (RFC 9180), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
ChaCha20-Poly1305; ``info`` names the payload by its digest, so that a key that was wrapped for one
release opens for no other. That a wrapped key is the right one is not the wrapper's word: the
release's signed statement has a check of the content key.

All wrapped keys of a release lie in one file beside its payload, for mirrors and sticks::

    8 bytes   magic "airwrap\0"
    1 byte    version, 1
    32 bytes  SHA-256 of the sealed payload
    4 bytes   number of entries, big-endian
    entries   16 bytes tag, 80 bytes wrapped key; sorted by tag

A tag says nothing to who doesn't know the recipient's public key: a mirror learns how many devices
can read a release, and not which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from protos.errors import WireError
from protos.signed_checks import HEX

MAGIC = b"airwrap\0"
VERSION = 1
TAG = 16
WRAPPED = 32 + 32 + 16  # the encapsulated key, the content key, its tag
ENTRY = TAG + WRAPPED
HEAD = len(MAGIC) + 1 + 32 + 4
MAX_ENTRIES = 100_000
MAX_BYTES = HEAD + MAX_ENTRIES * ENTRY

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
_INFO = b"airpeft.v1 content key\0"


class WrapError(WireError):
    """A wrapped key that does not open, or a file of them that is not one."""


def wrap(key: bytes, public: bytes, sha256: str) -> bytes:
    """Wrap a content key to one recipient: 80 bytes.

    Args:
        key: the content key, 32 bytes.
        public: the recipient's X25519 public key, 32 bytes.
        sha256: of the sealed payload, hex.

    Raises:
        WrapError: it is no public key that one can wrap to.
    """
    try:
        recipient = X25519PublicKey.from_public_bytes(public)
        return _SUITE.encrypt(key, recipient, info=_INFO + bytes.fromhex(sha256))
    except ValueError as error:  # points of small order among them (RFC 7748, section 6.1)
        raise WrapError(f"not a public key to wrap to: {error}") from None


def unwrap(wrapped: bytes, private: X25519PrivateKey, sha256: str) -> bytes:
    """The content key in a wrapped key.

    Raises:
        WrapError: it was wrapped to another key, or for another payload, or changed.
    """
    if len(wrapped) != WRAPPED:
        raise WrapError(f"a wrapped key has {WRAPPED} bytes, not {len(wrapped)}")
    try:
        return _SUITE.decrypt(wrapped, private, info=_INFO + bytes.fromhex(sha256))
    except (InvalidTag, ValueError):
        raise WrapError(
            "the wrapped key does not open: it is for another key or payload, or was changed"
        ) from None


def tag_of(public: bytes, sha256: str) -> bytes:
    """Under what a recipient's wrapped key is filed: 16 bytes, another one for each payload."""
    digest = hashlib.sha256(b"airpeft.v1 wrap\0" + bytes.fromhex(sha256) + public)
    return digest.digest()[:TAG]


def wraps_path(sha256: str) -> str:
    """Where a repository keeps the wrapped keys of a payload.

    >>> wraps_path("ab" * 32)[-12:]
    'ababab.wraps'
    """
    return f"wraps/{sha256}.wraps"


@dataclass(frozen=True)
class Wraps:
    """The wrapped keys of one payload.

    Attributes:
        sha256: of the sealed payload, hex.
        entries: wrapped keys by tag.
    """

    sha256: str
    entries: Mapping[bytes, bytes]

    def __post_init__(self) -> None:
        if not HEX.match(self.sha256):
            raise WrapError(f"sha256 {self.sha256[:80]!r} is not 64 hex digits")
        if len(self.entries) > MAX_ENTRIES:
            raise WrapError(f"{len(self.entries)} wrapped keys; at most {MAX_ENTRIES} are allowed")

    @classmethod
    def to(cls, key: bytes, sha256: str, recipients: Iterable[bytes]) -> Wraps:
        """A content key wrapped to each of these public keys.

        Raises:
            WrapError: one of them is none, or there are too many.
        """
        return cls(sha256, {tag_of(one, sha256): wrap(key, one, sha256) for one in recipients})

    def find(self, public: bytes) -> bytes | None:
        """The wrapped key of one recipient."""
        return self.entries.get(tag_of(public, self.sha256))

    def merged(self, more: Wraps, barred: Iterable[bytes] = ()) -> Wraps:
        """These and more of the same payload, without those of some public keys.

        What is there already stays: nobody can take a device's key away by sending another.

        Raises:
            WrapError: they are of another payload, or too many.
        """
        if more.sha256 != self.sha256:
            raise WrapError(f"wrapped keys for {more.sha256[:12]}…, not for {self.sha256[:12]}…")
        out = {tag_of(one, self.sha256) for one in barred}
        both = {**more.entries, **self.entries}
        return Wraps(self.sha256, {tag: one for tag, one in both.items() if tag not in out})

    def to_bytes(self) -> bytes:
        """The file, the same for the same entries."""
        head = MAGIC + bytes([VERSION]) + bytes.fromhex(self.sha256)
        parts = [head + len(self.entries).to_bytes(4, "big")]
        parts += [tag + wrapped for tag, wrapped in sorted(self.entries.items())]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes, sha256: str) -> Wraps:
        """The inverse of :meth:`to_bytes`.

        Args:
            data: the file.
            sha256: of the payload that it must be for.

        Raises:
            WrapError: it is no such file, or for another payload.
        """
        if len(data) > MAX_BYTES:
            raise WrapError(f"{len(data)} bytes of wrapped keys; at most {MAX_BYTES} are read")
        count = int.from_bytes(data[HEAD - 4 : HEAD], "big")
        whole = len(data) >= HEAD and len(data) == HEAD + count * ENTRY
        if not whole or data[: len(MAGIC) + 1] != MAGIC + bytes([VERSION]):
            raise WrapError("not a file of wrapped keys, or cut short")
        if data[len(MAGIC) + 1 : HEAD - 4].hex() != sha256:
            raise WrapError("a file of wrapped keys for another payload")
        places = range(HEAD, len(data), ENTRY)
        entries = {data[at : at + TAG]: data[at + TAG : at + ENTRY] for at in places}
        if len(entries) != count:
            raise WrapError("a file of wrapped keys with one entry twice")
        return cls(sha256, entries)
