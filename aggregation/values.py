"""The numbers of an adapter as bytes: bf16, f32 or int8, byte-shuffled.

    >>> import numpy as np
    >>> bf16_bits(np.float32([1.0, 1.00390625, -2.5])).tolist()  # ties go to the even neighbour
    [16256, 16256, 49184]

Only the numbers: which tensors there are, and how many values, is the specification's business.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter, AdapterError, FloatArray
from aggregation.spec import AdapterSpec

BLOCK = 128


def packed_length(spec: AdapterSpec, dtype: str) -> int:
    """Number of bytes that :func:`pack` makes."""
    if dtype == "int8":
        blocks = sum(rows * math.ceil(width / BLOCK) for rows, width in _rows(spec).values())
        return spec.size + 4 * blocks
    return spec.size * (2 if dtype == "bf16" else 4)


def pack(adapter: Adapter, dtype: str) -> bytes:
    """All values as bytes, in canonical order.

    Args:
        adapter: finite values.
        dtype: ``bf16``, ``f32`` or ``int8``.
    """
    if dtype == "bf16":
        return _shuffle(bf16_bits(adapter.pack()))
    if dtype == "f32":
        return _shuffle(adapter.pack().astype("<f4"))
    columns, rows = _column_keys(adapter.spec), _rows(adapter.spec)
    parts = [
        _quantise((value.T if key in columns else value).reshape(rows[key]))
        for key, value in adapter
    ]
    scales = np.concatenate([scale for scale, _ in parts])
    return _shuffle(scales.astype("<f4")) + b"".join(quanta.tobytes() for _, quanta in parts)


def unpack(spec: AdapterSpec, dtype: str, body: bytes) -> Adapter:
    """The inverse of :func:`pack`, up to rounding.

    Raises:
        AdapterError: if the body has another length, or a scale is not a finite positive number.
    """
    if len(body) != packed_length(spec, dtype):
        raise AdapterError(f"body of {len(body)} bytes, expected {packed_length(spec, dtype)}")
    if dtype == "bf16":
        bits = _unshuffle(body, "<u2").astype(np.uint32) << 16
        return Adapter.unpack(spec, bits.view(np.float32))
    if dtype == "f32":
        return Adapter.unpack(spec, _unshuffle(body, "<f4"))
    return _dequantise(spec, body)


def bf16_bits(vector: FloatArray) -> npt.NDArray[np.uint16]:
    """The upper 16 bits of float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(vector, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _shuffle(array: npt.NDArray[np.generic]) -> bytes:
    return array.view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()


def _unshuffle(data: bytes, dtype: str) -> npt.NDArray[np.generic]:
    width = np.dtype(dtype).itemsize
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    return np.ascontiguousarray(planes.T).view(dtype).ravel()


def _rows(spec: AdapterSpec) -> dict[str, tuple[int, int]]:
    """How many rows of how many values each tensor is cut into; blocks never cross a row.

    Rows are rank directions: rows of A, columns of B. Directions may differ a thousandfold in
    size, and a scale shared between a strong and a weak one would erase the weak one.
    """
    columns = _column_keys(spec)
    out = {}
    for key, shape in spec.shapes().items():
        rows = shape[-1] if key in columns else (shape[0] if len(shape) > 1 else 1)
        out[key] = (rows, math.prod(shape) // rows)
    return out


def _column_keys(spec: AdapterSpec) -> set[str]:
    """The B tensors, which are quantised by column."""
    return {module.keys[1] for module in spec.modules}


def _quantise(value: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int8]]:
    """Scales of shape (blocks,) and quanta of shape (values,) of a matrix of rows."""
    rows, columns = value.shape
    blocks = math.ceil(columns / BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = value
    cut = padded.reshape(rows * blocks, BLOCK)
    scales = (np.abs(cut).max(axis=1) / np.float32(127)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    quanta = np.clip(np.rint(cut / safe[:, None]), -127, 127).astype(np.int8)
    return scales, quanta.reshape(rows, -1)[:, :columns].ravel()


def _dequantise(spec: AdapterSpec, body: bytes) -> Adapter:
    scales = _unshuffle(body[: len(body) - spec.size], "<f4").astype(np.float32)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise AdapterError("a block has a scale that is negative, NaN or infinite")
    quanta = np.frombuffer(body, np.int8)[len(body) - spec.size :]
    columns, shapes, tensors = _column_keys(spec), spec.shapes(), {}
    for key, (rows, width) in _rows(spec).items():
        blocks = math.ceil(width / BLOCK)
        factors = np.repeat(scales[: rows * blocks].reshape(rows, blocks), BLOCK, axis=1)
        values = quanta[: rows * width].reshape(rows, width).astype(np.float32)
        with np.errstate(over="ignore"):  # an infinity is a matter for the digest and the guard
            values = values * factors[:, :width]
        quanta, scales = quanta[rows * width :], scales[rows * blocks :]
        tensors[key] = values.T if key in columns else values.reshape(shapes[key])
    return Adapter(spec, tensors)
