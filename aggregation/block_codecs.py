"""Codecs that write every coordinate in fewer bits: casts, and blocks with a scale of their own.

They carry differences from the start, not values: a training step is a thousandth of what it is
added to, and a 16-bit value has only three to four decimal digits.

    >>> import numpy as np
    >>> step = np.linspace(-1e-3, 1e-3, 128, dtype=np.float32)
    >>> for codec in (BFloat16(), Float16(), Int8(), Int4()):
    ...     data = codec.encode(step)
    ...     error = np.abs(codec.decode(data, 128) - step).max() / 1e-3
    ...     print(codec, len(data), f"{error:.0e}")
    bfloat16 256 2e-03
    float16 258 4e-04
    int8 132 4e-03
    int4 68 7e-02
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from aggregation.adapter import FloatArray
from aggregation.codec import Codec, CodecError, check_decoded, check_length, check_reach
from aggregation.errors import RecipeError
from aggregation.values import bf16_bits

MIN_BLOCK, MAX_BLOCK = 8, 1 << 16
_SMALLEST = np.float32(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class BFloat16(Codec):
    """Codec: differences with 8 significant bits, 2 bytes each; relative error up to 2^-8.

    Attributes:
        error_feedback: keep what rounding took away, and send it next time.
    """

    kind = "bfloat16"
    error_feedback: bool = False

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """2 bytes a value, rounded to nearest, ties to even.

        Raises:
            CodecError: if a value is not finite.
        """
        check_reach(vector, self.kind)
        return bf16_bits(vector).tobytes()

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The rounded values.

        Raises:
            CodecError: if there are not 2 bytes a value, or one is not finite.
        """
        check_length(data, self.nbytes(n), self.kind, n)
        vector = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        check_decoded(vector, self.kind)
        return vector

    def nbytes(self, n: int) -> int:
        """2 bytes a value."""
        return 2 * n


@dataclass(frozen=True)
class Float16(Codec):
    """Codec: differences with 11 significant bits, 2 bytes each, under one common power of two.

    The exponent makes the largest value lie in 1/2..1, so the relative error is up to 2^-11 for
    all that is above a 16,000th of it, and nothing overflows; plain IEEE half precision would
    round steps below 6e-8 to nothing.

    Attributes:
        error_feedback: keep what rounding took away, and send it next time.
    """

    kind = "float16"
    error_feedback: bool = False

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """2 bytes a value and 2 for the exponent, rounded to nearest, ties to even.

        Raises:
            CodecError: if a value is not finite.
        """
        check_reach(vector, self.kind)
        return halves(vector)

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The rounded values.

        Raises:
            CodecError: if there are not 2 bytes a value and 2 more, or a value is out of range.
        """
        check_length(data, self.nbytes(n), self.kind, n)
        return from_halves(data, self.kind)

    def nbytes(self, n: int) -> int:
        """2 bytes a value and 2 more."""
        return 2 * n + 2


@dataclass(frozen=True)
class _Blocks(Codec):
    """Blocks of whole numbers up to ``levels``, each block with a scale.

    A scale is the block's largest absolute value over ``levels``, rounded up to bfloat16: 2 bytes,
    and never so small that a value falls outside. Blocks smaller than any normal number are zero.
    """

    levels: ClassVar[int]
    per_byte: ClassVar[int]
    block: int = 64
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if not MIN_BLOCK <= self.block <= MAX_BLOCK:
            raise RecipeError(
                f"codec={self.kind}: block={self.block} is not in {MIN_BLOCK}..{MAX_BLOCK}; "
                "choose 64"
            )

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """Scales, then numbers; rounded to nearest, ties to even.

        Raises:
            CodecError: if a value is not finite.
        """
        check_reach(vector, self.kind)
        n, blocks = vector.size, -(-vector.size // self.block)
        padded = np.zeros((blocks, self.block), np.float32)
        padded.reshape(-1)[:n] = vector
        peak = np.maximum(padded.max(axis=1, initial=0), -padded.min(axis=1, initial=0))
        scale = peak / np.float32(self.levels)
        scale[scale < _SMALLEST] = 0
        bits = ((scale.view(np.uint32) + 0xFFFF) >> 16).astype("<u2")
        divisor = _from_bits(bits)
        divisor[divisor == 0] = np.inf
        padded /= divisor[:, None]
        numbers = np.rint(padded, out=padded).astype(np.int8).reshape(-1)[:n]
        body: bytes = numbers.tobytes() if self.per_byte == 1 else _nibbles(numbers)
        scales: bytes = bits.tobytes()
        return scales + body

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The rounded values.

        Raises:
            CodecError: if the length is another, or a scale or a number is out of range.
        """
        check_length(data, self.nbytes(n), self.kind, n)
        blocks = -(-n // self.block)
        scale = _from_bits(np.frombuffer(data, "<u2", blocks))
        if not (np.isfinite(scale).all() and (scale >= 0).all()):
            raise CodecError(f"codec {self.kind}: a scale is negative, NaN or infinite")
        body = data[2 * blocks :]
        quanta = np.frombuffer(body, np.int8) if self.per_byte == 1 else _from_nibbles(body, n)
        if n and quanta.min() < -self.levels:
            raise CodecError(f"codec {self.kind}: a number below -{self.levels}")
        out = np.zeros((blocks, self.block), np.float32)
        out.reshape(-1)[:n] = quanta
        with np.errstate(over="ignore"):
            out *= scale[:, None]
        vector = out.reshape(-1)[:n]
        check_decoded(vector, self.kind)
        return vector

    def nbytes(self, n: int) -> int:
        """The numbers, and 2 bytes a block."""
        return 2 * -(-n // self.block) + -(-n // self.per_byte)


@dataclass(frozen=True)
class Int8(_Blocks):
    """Codec: differences as -127..127 in blocks, 1.03 bytes each; error up to 1/252 of the peak.

    Attributes:
        block: values that share a scale, 8 to 65536.
        error_feedback: keep what rounding took away, and send it next time.
    """

    kind = "int8"
    levels = 127
    per_byte = 1


@dataclass(frozen=True)
class Int4(_Blocks):
    """Codec: differences as -7..7 in blocks, 0.53 bytes each; error up to 1/13 of the peak.

    Attributes:
        block: values that share a scale, 8 to 65536.
        error_feedback: keep what rounding took away, and send it next time.
    """

    kind = "int4"
    levels = 7
    per_byte = 2


def halves(vector: FloatArray) -> bytes:
    """An exponent (int16) and the values over that power of two as float16."""
    peak = float(np.abs(vector).max(initial=0))
    exponent = int(np.frexp(peak)[1])
    scaled = np.ldexp(vector, -exponent).astype("<f2")
    return exponent.to_bytes(2, "little", signed=True) + scaled.tobytes()


def from_halves(data: bytes, kind: str) -> FloatArray:
    """The inverse of :func:`halves`.

    Raises:
        CodecError: if the exponent or a value is out of range.
    """
    exponent = int.from_bytes(data[:2], "little", signed=True)
    scaled = np.frombuffer(data, "<f2", offset=2).astype(np.float32)
    if not -150 <= exponent <= 128 or not (np.abs(scaled) <= 1).all():
        raise CodecError(f"codec {kind}: exponent {exponent} or a value is out of range")
    return np.ldexp(scaled, exponent)


def _from_bits(bits: npt.NDArray[np.uint16]) -> FloatArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _nibbles(quanta: npt.NDArray[np.int8]) -> bytes:
    """Two numbers a byte, the first in the low half, 8 added; an odd last one has 0 beside it."""
    out = np.zeros(len(quanta) + len(quanta) % 2, np.uint8)
    out[: len(quanta)] = (quanta + 8).view(np.uint8)
    packed: bytes = (out[::2] | (out[1::2] << 4)).tobytes()
    return packed


def _from_nibbles(data: bytes, n: int) -> npt.NDArray[np.int8]:
    packed = np.frombuffer(data, np.uint8)
    nibbles = np.empty(2 * len(packed), np.uint8)
    nibbles[::2] = packed & 15
    nibbles[1::2] = packed >> 4
    if nibbles[n:].any():
        raise CodecError("codec int4: half a byte too many")
    return nibbles[:n].view(np.int8) - np.int8(8)
