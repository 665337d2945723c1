"""Where k of n coordinates are, in few bytes.

It is written in the smaller of two forms, which both sides know from k and n alone: a bitmap
(n bits), or the numbers in Elias-Fano form (Elias 1974, Fano 1971), the b low bits of each as they
are and the high ones as a unary count of their gaps: ``k (b + 1) + n / 2^b`` bits. At k = n / 10
that is 5.3 bits a number, against 4.7 in theory and 4.8 with Golomb's code, whose length however
depends on the data; here every size is known beforehand and can be checked.

    >>> import numpy as np
    >>> index_bytes(10, 1000), len(encode_index(np.arange(0, 1000, 100), 1000))
    (12, 12)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aggregation.adapter import FloatArray
from aggregation.codec import CodecError, check_length

Index = npt.NDArray[np.int64]


def largest(vector: FloatArray, k: int) -> Index:
    """Places of the k values that are largest in absolute value, increasing.

    Of equal values the first ones are taken.
    """
    if k >= vector.size:
        return np.arange(vector.size)
    size = np.abs(vector)
    least = np.partition(size, vector.size - k)[vector.size - k]
    chosen = size > least
    ties = np.flatnonzero(size == least)
    chosen[ties[: k - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def index_bytes(k: int, n: int) -> int:
    """Bytes that say which k of n coordinates are meant."""
    if k in (0, n):
        return 0
    return min(_bitmap_bytes(n), _gap_bytes(k, n, _low_bits(k, n)))


def encode_index(index: Index, n: int) -> bytes:
    """Where the chosen of n coordinates are.

    Args:
        index: their numbers, increasing.
        n: how many there are.
    """
    k = len(index)
    if k in (0, n):
        return b""
    low = _low_bits(k, n)
    if _bitmap_bytes(n) <= _gap_bytes(k, n, low):
        bitmap = np.zeros(n, np.uint8)
        bitmap[index] = 1
        return np.packbits(bitmap).tobytes()
    lows = (index[:, None] >> np.arange(low - 1, -1, -1)) & 1
    unary = np.zeros(_unary_bits(k, n, low), np.uint8)
    unary[(index >> low) + np.arange(k)] = 1
    return np.packbits(lows.astype(np.uint8)).tobytes() + np.packbits(unary).tobytes()


def decode_index(data: bytes, k: int, n: int) -> Index:
    """The inverse of :func:`encode_index`.

    Raises:
        CodecError: if the bytes do not give k different numbers below n.
    """
    check_length(data, index_bytes(k, n), "index", k)
    if k in (0, n):
        return np.arange(k)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    low = _low_bits(k, n)
    if _bitmap_bytes(n) <= _gap_bytes(k, n, low):
        index, rest = np.flatnonzero(bits[:n]), bits[n:]
    else:
        first = 8 * (-(-k * low // 8))
        length = _unary_bits(k, n, low)
        ones = np.flatnonzero(bits[first : first + length])
        rest = np.concatenate([bits[k * low : first], bits[first + length :]])
        if len(ones) != k:
            raise CodecError(f"index: {len(ones)} places, expected {k}")
        weights = (1 << np.arange(low - 1, -1, -1)).astype(np.int64)
        lows = bits[: k * low].reshape(k, low).astype(np.int64) @ weights
        index = ((ones - np.arange(k)) << low) + lows
    if len(index) != k or rest.any() or index[-1] >= n or not (np.diff(index) > 0).all():
        raise CodecError(f"index: not {k} increasing places below {n}")
    return index


def _bitmap_bytes(n: int) -> int:
    return -(-n // 8)


def _gap_bytes(k: int, n: int, low: int) -> int:
    return -(-k * low // 8) + -(-_unary_bits(k, n, low) // 8)


def _unary_bits(k: int, n: int, low: int) -> int:
    return k + ((n - 1) >> low)


def _low_bits(k: int, n: int) -> int:
    return min(range(32), key=lambda low: _gap_bytes(k, n, low))
