"""The codec piece: how the numbers of an update travel.

>>> import numpy as np
>>> len(Float32().encode(np.ones(6, np.float32)))
24
>>> read_codec("float32")
Float32()
"""

# ruff: noqa: A005 - nobody imports it as a top-level module
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.adapter import FloatArray
from aggregation.block_codecs import BFloat16, Float16, Int4, Int8
from aggregation.codec import Codec, CodecError, check_length
from aggregation.errors import RecipeError
from aggregation.piece import read_piece
from aggregation.ring import FixedPoint
from aggregation.sparse_codecs import Segments, TopK, ZerosOmitted

__all__ = [
    "CODECS",
    "BFloat16",
    "Codec",
    "CodecError",
    "FixedPoint",
    "Float16",
    "Float32",
    "Int4",
    "Int8",
    "Segments",
    "TopK",
    "ZerosOmitted",
    "read_codec",
]


@dataclass(frozen=True)
class Float32(Codec):
    """Codec: values travel as they are, 4 bytes each, little-endian."""

    kind = "float32"
    absolute = True
    linear = True
    lossless = True

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """4 bytes a value, whatever it is."""
        return vector.astype("<f4", copy=False).tobytes()

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The same values, bit for bit.

        Raises:
            CodecError: if there are not 4 bytes a value.
        """
        check_length(data, self.nbytes(n), self.kind, n)
        return np.frombuffer(data, "<f4").astype(np.float32, copy=False)

    def nbytes(self, n: int) -> int:
        """4 bytes a value."""
        return 4 * n


CODECS: tuple[type[Codec], ...] = (
    Float32,
    BFloat16,
    Float16,
    Int8,
    Int4,
    TopK,
    Segments,
    FixedPoint,
)
_ALL: tuple[type[Codec], ...] = (*CODECS, ZerosOmitted)
_READ: dict[str, type[Codec]] = {kind.kind: kind for kind in _ALL}


def read_codec(text: str) -> Codec:
    """A codec as it is written, such as ``float32``.

    Raises:
        CodecError: if there is none of this name, or a setting is not allowed.
    """
    try:
        codec: Codec = read_piece(text, _READ, "codec")
    except RecipeError as error:
        raise CodecError(str(error)) from None
    return codec
