r"""A payload that only the holder of its content key can read, sealed chunk by chunk.

The construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption
and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015) over the AEAD ChaCha20-Poly1305 (RFC 8439, in
the form of RFC 5116), which needs no AES hardware to be quick and even. Layout::

    8 bytes   magic "airseal\0"
    1 byte    version, 1
    rest      chunks: 65536 bytes of plaintext each, the last one shorter, each followed by its tag

The nonce of a chunk is its number (11 bytes, big-endian) and one byte that is 1 for the last chunk:
a chunk that is changed, moved, left out, repeated or put behind the last one does not open. The key
of the chunks is HKDF-SHA256 of the content key over the head, so a head that was changed opens
nothing either. A content key seals one payload, once; nonces therefore need no random part.

What comes out of :class:`Opener` is authentic chunk by chunk; whether it was all of it is known
when the last chunk has opened, so nothing may be done with a part.
"""

from __future__ import annotations

import hmac
import io
import secrets
from collections.abc import Callable, Iterator
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation.payload import PayloadError

MAGIC = b"airseal\0"
VERSION = 1
HEAD = MAGIC + bytes([VERSION])
CHUNK = 65_536
TAG = 16
KEY = 32


class SealError(PayloadError):
    """Bytes that do not open with this key, or are not all there; nothing of them may be used."""


def new_key(random: Callable[[int], bytes] = secrets.token_bytes) -> bytes:
    """A fresh content key, 32 bytes; it seals one payload."""
    return random(KEY)


def key_check(key: bytes) -> str:
    """What may be published of a content key, so that its holder knows it for the right one.

    Returns:
        64 hex digits. The cipher alone does not commit to its key; this does.

    >>> key_check(bytes(32)) == key_check(bytes(31) + b"x")
    False
    """
    return _derived(key, b"airpeft.v1 key check").hex()


def is_right(key: bytes, check: str) -> bool:
    """Whether a content key is the one that ``check`` was published for."""
    return len(key) == KEY and hmac.compare_digest(key_check(key), check)


def is_sealed(data: bytes) -> bool:
    """Whether these bytes say of themselves that they are sealed."""
    return data[: len(MAGIC)] == MAGIC


def sealed_length(plain: int) -> int:
    """Length of ``plain`` bytes once they are sealed.

    >>> sealed_length(3_000_000) - 3_000_000
    745
    """
    return len(HEAD) + plain + TAG * max(1, -(-plain // CHUNK))


def plain_length(sealed: int) -> int:
    """Length of what is in ``sealed`` bytes.

    >>> all(plain_length(sealed_length(n)) == n for n in (0, 1, CHUNK, CHUNK + 1, 5 * CHUNK))
    True

    Raises:
        SealError: nothing sealed has this length.
    """
    body = sealed - len(HEAD)
    plain = body - TAG * max(1, -(-body // (CHUNK + TAG)))
    if plain < 0 or sealed_length(plain) != sealed:
        raise SealError(f"nothing that is sealed has {sealed} bytes: it is cut short or lengthened")
    return plain


def seal(data: bytes, key: bytes) -> bytes:
    """Seal a payload.

    Args:
        data: the plaintext.
        key: a content key of its own (:func:`new_key`), 32 bytes.
    """
    cipher = _cipher(key)
    out = bytearray(HEAD)
    view = memoryview(data)
    count = max(1, -(-len(data) // CHUNK))
    for number in range(count):
        chunk = view[number * CHUNK : (number + 1) * CHUNK]
        out += cipher.encrypt(_nonce(number, number + 1 == count), chunk, None)
    return bytes(out)


class Opener:
    """Sealed bytes, read as what is in them; no more than two chunks are held at a time.

    Args:
        source: the sealed bytes, or a file open for reading at its start.
        key: the content key.
        limit: the most plaintext that is handed out, in bytes.
    """

    def __init__(self, source: bytes | BinaryIO, key: bytes, *, limit: int) -> None:
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        self._chunks = open_chunks(stream, key)
        self._left, self._rest = limit, b""

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; all that is left for -1; nothing at the end.

        Raises:
            SealError: a chunk does not open, the end is missing, or there is more than ``limit``.
        """
        parts, got = [self._rest], len(self._rest)
        while size < 0 or got < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._left -= len(chunk)
            if self._left < 0:
                raise SealError("there is more in it than is allowed")
            parts.append(chunk)
            got += len(chunk)
        whole = b"".join(parts)
        end = len(whole) if size < 0 else size
        self._rest = whole[end:]
        return whole[:end]


def open_chunks(source: BinaryIO, key: bytes) -> Iterator[bytes]:
    """The plaintext chunk by chunk.

    Raises:
        SealError: not sealed bytes, or a chunk does not open.
    """
    head = source.read(len(HEAD))
    if head[: len(MAGIC)] != MAGIC:
        raise SealError("not a sealed payload: the first bytes are wrong")
    if head != HEAD:
        raise SealError(f"sealed in version {head[len(MAGIC) :].hex()}; update the agent")
    cipher, number = _cipher(key), 0
    block = source.read(CHUNK + TAG)
    while True:
        following = source.read(CHUNK + TAG) if len(block) == CHUNK + TAG else b""
        if len(block) < TAG or (number and len(block) == TAG):
            raise SealError(f"chunk {number} is cut short")
        try:
            yield cipher.decrypt(_nonce(number, not following), block, None)
        except InvalidTag:
            raise SealError(
                f"chunk {number} does not open: it was changed, moved or cut, or the key is another"
            ) from None
        if not following:
            return
        block, number = following, number + 1


def _cipher(key: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(_derived(key, b"airpeft.v1 payload " + HEAD))


def _derived(key: bytes, info: bytes) -> bytes:
    if len(key) != KEY:
        raise SealError(f"a content key has {KEY} bytes, not {len(key)}")
    return HKDF(algorithm=SHA256(), length=KEY, salt=None, info=info).derive(key)


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
