"""Codecs that send some coordinates of a vector, and where they are.

Coordinates that do not travel are, on the other side, as at the start.

    >>> import numpy as np
    >>> codec = TopK(density=0.25, values="float32")
    >>> codec.decode(codec.encode(np.float32([3, -4, 0, 1])), 4).tolist()
    [0.0, -4.0, 0.0, 0.0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aggregation.adapter import FloatArray
from aggregation.block_codecs import from_halves, halves
from aggregation.codec import Codec, CodecError, check_decoded, check_length, check_reach
from aggregation.errors import RecipeError
from aggregation.index_coding import decode_index, encode_index, index_bytes, largest

MIN_DENSITY = 1e-5
MAX_PARTS = 4096
_HEAD = 4


@dataclass(frozen=True)
class TopK(Codec):
    """Codec: the differences that are largest over all tensors together, and their places.

    FLASC (2406.05233, section 3) sends the top-k of the flattened change, of a client that trained
    densely, and drops the rest; ``error_feedback`` keeps it for the next round instead. Without,
    the small coordinates are lost every time and the mean is biased. Adam's first steps make all
    differences about equally large, where blocks (``int4``) lose much less at the same size. Of
    equal values the first ones are taken, so that the choice is repeatable.

    Attributes:
        density: share of the coordinates that travel, rounded up to a whole number of them.
        values: how they are written, ``float16`` (see :class:`~aggregation.block_codecs.Float16`)
            or ``float32``.
        error_feedback: keep what did not travel, and add it to the next update.
    """

    kind = "top-k"
    density: float = 0.1
    values: str = "float16"
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if not MIN_DENSITY <= self.density <= 1:
            raise RecipeError(
                f"codec={self.kind}: density={self.density:g} is not in {MIN_DENSITY:g}..1"
            )
        if self.values not in ("float16", "float32"):
            raise RecipeError(
                f"codec={self.kind}: values={self.values!r} is not float16 or float32"
            )

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """Places, then values.

        Raises:
            CodecError: if a value is not finite.
        """
        check_reach(vector, self.kind)
        index = largest(vector, self.count(vector.size))
        chosen = vector[index]
        written = halves(chosen) if self.values == "float16" else chosen.astype("<f4").tobytes()
        return encode_index(index, vector.size) + written

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The values that travelled, zero elsewhere.

        Raises:
            CodecError: if the length is another, or a place or a value is impossible.
        """
        check_length(data, self.nbytes(n), self.kind, n)
        k = self.count(n)
        split = index_bytes(k, n)
        index = decode_index(data[:split], k, n)
        if self.values == "float16":
            chosen = from_halves(data[split:], self.kind)
        else:
            chosen = np.frombuffer(data, "<f4", k, split).astype(np.float32)
            check_decoded(chosen, self.kind)
        out = np.zeros(n, np.float32)
        out[index] = chosen
        return out

    def nbytes(self, n: int) -> int:
        """Bytes of the places and of the values; they do not depend on the data."""
        k = self.count(n)
        return index_bytes(k, n) + (2 * k + 2 if self.values == "float16" else 4 * k)

    def count(self, n: int) -> int:
        """How many of n coordinates travel."""
        return min(n, math.ceil(self.density * n - 1e-9))  # 0.07 of 100 is 7


@dataclass(frozen=True)
class Segments(Codec):
    """Codec: one of ``count`` equal segments of the flat vector, another one in every round.

    EcoLoRA (2506.02001, section 3.2), without its further sparsity and Golomb coding. Whose turn
    it is follows from a client's name and the round, see :func:`aggregation.parcel.turn_of`. What
    did not travel is lost, and a coordinate is averaged over those who sent it
    (reduce=sent-mean); with ``error_feedback`` it waits for its turn, and the mean is over all
    (reduce=factor-mean). :mod:`aggregation.codec_soundness` says why, and refuses other means.

    Attributes:
        count: number of segments, 2 to 4096.
        error_feedback: keep what did not travel, and add it to the next update.
    """

    kind = "segments"
    linear = True
    count: int = 4
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.count <= MAX_PARTS:
            raise RecipeError(f"codec={self.kind}: count={self.count} is not in 2..{MAX_PARTS}")

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """The segment's number in 2 bytes, and its values in 4 each.

        Args:
            vector: float32 of shape (n,).
            turn: segment ``turn`` modulo ``count`` travels.

        Raises:
            CodecError: if a value is not finite.
        """
        check_reach(vector, self.kind)
        part = turn % self.count
        chosen = vector[self._part(part, vector.size)]
        return part.to_bytes(2, "little") + chosen.astype("<f4", copy=False).tobytes()

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The segment that travelled, zero elsewhere.

        Raises:
            CodecError: if there is no such segment, or the length is another.
        """
        part = int.from_bytes(data[:2], "little")
        if len(data) < 2 or part >= self.count:
            raise CodecError(f"codec {self.kind}: no segment of {self.count}")
        place = self._part(part, n)
        check_length(data, 2 + 4 * (place.stop - place.start), self.kind, n)
        out = np.zeros(n, np.float32)
        out[place] = np.frombuffer(data, "<f4", offset=2)
        check_decoded(out[place], self.kind)
        return out

    def nbytes(self, n: int) -> int:
        """Bytes of the largest segment; the others have at most one value less."""
        return 2 + 4 * -(-n // self.count)

    def _part(self, part: int, n: int) -> slice:
        return slice(part * n // self.count, (part + 1) * n // self.count)


@dataclass(frozen=True)
class ZerosOmitted(Codec):
    """What of a vector is not zero, bit for bit, in 4 bytes each: the lossless form.

    It is no choice of a recipe: ``float32`` takes this form by itself where it is the smaller one,
    relative to the start for an update, and to what the client still has for a task.
    """

    kind = "zeros-omitted"
    lossless = True

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """A count, the places and the values of all bit patterns but that of +0."""
        bits = np.ascontiguousarray(vector, np.float32).view(np.uint32)
        index = np.flatnonzero(bits)
        values = bits[index].astype("<u4", copy=False).tobytes()
        return len(index).to_bytes(_HEAD, "little") + encode_index(index, vector.size) + values

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The same values, bit for bit.

        Raises:
            CodecError: if the bytes are not as many as their count says, or a place is impossible.
        """
        count = int.from_bytes(data[:_HEAD], "little")
        if len(data) < _HEAD or count > n:
            raise CodecError(f"codec {self.kind}: malformed count of values, of {n}")
        check_length(data, omitted_bytes(count, n), self.kind, n)
        split = _HEAD + index_bytes(count, n)
        index = decode_index(data[_HEAD:split], count, n)
        values = np.frombuffer(data, "<u4", count, split)
        if not values.all():
            raise CodecError(f"codec {self.kind}: a zero that should have been left out")
        out = np.zeros(n, np.uint32)
        out[index] = values
        return out.view(np.float32)

    def nbytes(self, n: int) -> int:
        """The most there can be: where one value is zero, the places of the others are said."""
        return max(omitted_bytes(n, n), omitted_bytes(max(0, n - 1), n))


def omitted_bytes(k: int, n: int) -> int:
    """Bytes of n values of which k are not zero, in the lossless form."""
    return _HEAD + index_bytes(k, n) + 4 * k
