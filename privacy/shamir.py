"""Shamir's secret sharing (1979) of 32-byte secrets, over the field of 2^521 - 1 elements.

>>> pieces = split(b"k" * 32, holders=5, threshold=3)
>>> join({number: pieces[number] for number in (1, 4, 5)}) == b"k" * 32
True

Fewer pieces than the threshold say nothing at all about the secret: for each possible secret
there is exactly one polynomial through them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

from privacy.errors import PrivacyError

PRIME = (1 << 521) - 1  # a Mersenne prime: reduction is cheap and nothing has to be taken on trust
SECRET_BYTES = 32
PIECE_BYTES = 66


class SharingError(PrivacyError):
    """A secret that cannot be split as asked, or pieces that do not belong together."""


def split(
    secret: bytes,
    *,
    holders: int,
    threshold: int,
    below: Callable[[int], int] = secrets.randbelow,
) -> dict[int, bytes]:
    """Pieces of a secret, any ``threshold`` of which give it back.

    Args:
        secret: 32 bytes.
        holders: number of pieces.
        threshold: how many of them are needed; 1 to ``holders``.
        below: a uniform random number below a bound.

    Returns:
        66 bytes for each holder, numbered from 1.

    Raises:
        SharingError: if the sizes make no sense.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise SharingError(
            f"cannot split {len(secret)} bytes into {holders} pieces with threshold {threshold}: "
            f"the secret must have {SECRET_BYTES} bytes, the threshold lie in 1..{holders}"
        )
    coefficients = [int.from_bytes(secret, "big"), *(below(PRIME) for _ in range(threshold - 1))]
    pieces = {}
    for number in range(1, holders + 1):
        value = 0
        for coefficient in reversed(coefficients):  # Horner
            value = (value * number + coefficient) % PRIME
        pieces[number] = value.to_bytes(PIECE_BYTES, "big")
    return pieces


def join(pieces: Mapping[int, bytes]) -> bytes:
    """The secret, from at least as many pieces as the threshold.

    Args:
        pieces: by holder's number.

    Raises:
        SharingError: if there is none, or they do not give a secret of 32 bytes: fewer than the
            threshold, or a wrong one among them.
    """
    points = {}
    for number, piece in pieces.items():
        value = int.from_bytes(piece, "big")
        if len(piece) != PIECE_BYTES or value >= PRIME or number < 1:
            raise SharingError(f"piece {number} is malformed")
        points[number] = value
    if not points:
        raise SharingError("there is no piece")
    secret = 0
    for number, value in points.items():  # Lagrange's interpolation at zero
        above = below = 1
        for other in points:
            if other != number:
                above = above * other % PRIME
                below = below * (other - number) % PRIME
        secret = (secret + value * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 1 << (8 * SECRET_BYTES):
        raise SharingError(
            "the pieces give no secret: there are fewer than the threshold, or one is wrong"
        )
    return secret.to_bytes(SECRET_BYTES, "big")
