"""The numbers of an adapter as bytes: bf16, f32 or int8, byte-shuffled.

    >>> import numpy as np
    >>> bf16_bits(np.float32([1.0, 1.00390625, -2.5])).tolist()  # ties go to the even neighbour
    [16256, 16256, 49184]

Only the numbers: which tensors there are, and how many values, is the specification's business.

Tensors that multiply what the base computes (IA3 vectors, DoRA magnitudes) stay float32 whatever
the dtype: they differ from one, or from the base's norms, by a per cent or so, and bf16 rounds by
half a per cent. They are short, and lie behind the others in the body.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregation import peft_types
from aggregation.adapter import Adapter, AdapterError, FloatArray
from aggregation.spec import AdapterSpec

BLOCK = 128


def packed_length(spec: AdapterSpec, dtype: str) -> int:
    """Number of bytes that :func:`pack` makes."""
    kept = _size(_precise(spec, dtype))
    rest = spec.size - kept
    if dtype == "int8":
        blocks = sum(rows * math.ceil(width / BLOCK) for rows, width in _rows(spec).values())
        return rest + 4 * blocks + 4 * kept
    return rest * (2 if dtype == "bf16" else 4) + 4 * kept


def pack(adapter: Adapter, dtype: str) -> bytes:
    """All values as bytes, in canonical order.

    Args:
        adapter: finite values.
        dtype: ``bf16``, ``f32`` or ``int8``.
    """
    if dtype == "f32":
        return _shuffle(adapter.pack().astype("<f4"))
    precise = _precise(adapter.spec, dtype)
    behind = _shuffle(_vector(adapter, precise).astype("<f4"))
    rest = [key for key in adapter.spec.shapes() if key not in precise]
    if dtype == "bf16":
        return _shuffle(bf16_bits(_vector(adapter, rest))) + behind
    columns, rows = _column_keys(adapter.spec), _rows(adapter.spec)
    parts = [
        _quantise((value.T if key in columns else value).reshape(rows[key]))
        for key, value in ((key, adapter.tensors[key]) for key in rest)
    ]
    scales = np.concatenate([np.zeros(0, np.float32), *(scale for scale, _ in parts)])
    front = _shuffle(scales.astype("<f4")) + b"".join(quanta.tobytes() for _, quanta in parts)
    return front + behind


def unpack(spec: AdapterSpec, dtype: str, body: bytes) -> Adapter:
    """The inverse of :func:`pack`, up to rounding.

    Raises:
        AdapterError: if the body has another length, or a scale is not a finite positive number.
    """
    if len(body) != packed_length(spec, dtype):
        raise AdapterError(f"body of {len(body)} bytes, expected {packed_length(spec, dtype)}")
    if dtype == "f32":
        return Adapter.unpack(spec, _unshuffle(body, "<f4"))
    precise = _precise(spec, dtype)
    front = len(body) - 4 * _size(precise)
    rest = {key: shape for key, shape in spec.shapes().items() if key not in precise}
    tensors = _cut(_unshuffle(body[front:], "<f4"), precise)
    if dtype == "bf16":
        bits = _unshuffle(body[:front], "<u2").astype(np.uint32) << 16
        tensors |= _cut(bits.view(np.float32), rest)
    else:
        tensors |= _dequantise(spec, rest, body[:front])
    return Adapter(spec, tensors)


def bf16_bits(vector: FloatArray) -> npt.NDArray[np.uint16]:
    """The upper 16 bits of float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(vector, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _precise(spec: AdapterSpec, dtype: str) -> dict[str, tuple[int, ...]]:
    """The tensors that are float32 in any case, where the others are not, in canonical order."""
    keys = peft_types.scales(spec) if dtype != "f32" else frozenset()
    return {key: shape for key, shape in spec.shapes().items() if key in keys}


def _size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _vector(adapter: Adapter, keys: Iterable[str]) -> FloatArray:
    nothing = np.zeros(0, np.float32)
    return np.concatenate([nothing, *(adapter.tensors[key].ravel() for key in keys)])


def _cut(
    vector: npt.NDArray[Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, npt.NDArray[Any]]:
    """The inverse of :func:`_vector`."""
    tensors, start = {}, 0
    for key, shape in shapes.items():
        stop = start + math.prod(shape)
        tensors[key] = vector[start:stop].reshape(shape)
        start = stop
    return tensors


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
    columns, precise = _column_keys(spec), peft_types.scales(spec)
    out = {}
    for key, shape in spec.shapes().items():
        if key in precise:
            continue
        rows = shape[-1] if key in columns else (shape[0] if len(shape) > 1 else 1)
        out[key] = (rows, math.prod(shape) // rows)
    return out


def _column_keys(spec: AdapterSpec) -> set[str]:
    """The B tensors and the ways up of bottlenecks, which are quantised by column."""
    ups = {t.key for t in spec.own if t.name.endswith(peft_types.UP_SUFFIX)}
    return ups | {module.keys[1] for module in spec.modules}


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


def _dequantise(
    spec: AdapterSpec, shapes: Mapping[str, tuple[int, ...]], body: bytes
) -> dict[str, npt.NDArray[Any]]:
    size = _size(shapes)
    scales = _unshuffle(body[: len(body) - size], "<f4").astype(np.float32)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise AdapterError("a block has a scale that is negative, NaN or infinite")
    quanta = np.frombuffer(body, np.int8)[len(body) - size :]
    columns, tensors = _column_keys(spec), {}
    for key, (rows, width) in _rows(spec).items():
        blocks = math.ceil(width / BLOCK)
        factors = np.repeat(scales[: rows * blocks].reshape(rows, blocks), BLOCK, axis=1)
        values = quanta[: rows * width].reshape(rows, width).astype(np.float32)
        with np.errstate(over="ignore"):  # an infinity is a matter for the digest and the guard
            values = values * factors[:, :width]
        quanta, scales = quanta[rows * width :], scales[rows * blocks :]
        tensors[key] = values.T if key in columns else values.reshape(shapes[key])
    return tensors
