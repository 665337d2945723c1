"""What every codec has: how a flat vector of numbers becomes bytes and comes back.

A codec sees one float32 vector of n values and knows nothing of tensors: which values they are, and
what they are relative to, is :mod:`aggregation.parcel`'s business. All of them round to nearest and
never at random, for three reasons: both sides must arrive at the same bits; a repeated round must
be the same round; and error feedback, which remembers what rounding took away, removes the bias
that random rounding is meant to hide, without its variance (Karimireddy et al. 2019, 1901.09847,
theorem II).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from aggregation.adapter import FloatArray
from aggregation.errors import AggregationError
from aggregation.piece import Piece


class CodecError(AggregationError):
    """Numbers that a codec cannot carry, or bytes that it did not make."""


MOST = np.float32(3e38)  # rounded up in any codec it is still a float32


class Codec(Piece, ABC):
    """Base of all codecs; a subclass is a frozen dataclass.

    Attributes:
        absolute: the values themselves travel; otherwise their differences from the start.
        linear: decoding the sum is the sum of the decoded, so a secure sum can add what travels.
        lossless: what is decoded is what was encoded, bit for bit.
    """

    absolute: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    lossless: ClassVar[bool] = False

    @property
    def stateful(self) -> bool:
        """Whether a client keeps what rounding took away, and adds it to its next update."""
        return bool(getattr(self, "error_feedback", False))

    @abstractmethod
    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """The bytes of n values.

        Args:
            vector: float32 of shape (n,).
            turn: which part travels, for a codec that sends a part.

        Raises:
            CodecError: if the values are out of its reach.
        """

    @abstractmethod
    def decode(self, data: bytes, n: int) -> FloatArray:
        """The n values.

        Raises:
            CodecError: if the bytes are not what :meth:`encode` makes of n values.
        """

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """Bytes of n values."""


def check_reach(vector: FloatArray, kind: str) -> None:
    """Refuse values that no lossy codec can carry.

    Raises:
        CodecError: if a value is NaN, infinite, or beyond :data:`MOST`.
    """
    good = np.abs(vector) <= MOST
    if not good.all():
        raise CodecError(
            f"codec {kind}: {int((~good).sum())} of {vector.size} values are NaN, infinite or "
            f"beyond {MOST:g}: training has diverged; lower the learning rate"
        )


def check_decoded(vector: FloatArray, kind: str) -> None:
    """Refuse bytes that no lossy codec makes.

    Raises:
        CodecError: if a value is NaN or infinite.
    """
    if not np.isfinite(vector).all():
        raise CodecError(f"codec {kind}: what came holds values that are NaN or infinite")


def check_length(data: bytes, expected: int, kind: str, n: int) -> None:
    """Refuse bytes of another length than n values have.

    Raises:
        CodecError: if the length is another.
    """
    if len(data) != expected:
        raise CodecError(f"codec {kind}: {len(data)} bytes; {n} values have {expected}")
