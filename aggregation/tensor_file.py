"""Safetensors in and out, with the checks that the format's own reader leaves to its caller.

The library's reader accepts duplicate names, and hundreds of thousands of empty tensors. Here a
file is read whole, from memory, against fixed limits: header up to 1 MiB, no name twice, no empty
tensor, data contiguous from first to last byte, floats only. bfloat16 is widened to float32.

    >>> import numpy as np
    >>> tensors, metadata = load(save({"x": np.ones((2, 2), np.float32)}, "pt"))
    >>> tensors["x"].tolist(), metadata
    ([[1.0, 1.0], [1.0, 1.0]], {'format': 'pt'})

It knows nothing of adapters. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from aggregation.errors import AggregationError

MAX_HEADER = 1 << 20
MAX_TENSORS = 16_384
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class TensorFileReason(StrEnum):
    """What is wrong with a safetensors file."""

    BAD_HEADER = "bad-header"
    DUPLICATE_TENSOR = "duplicate-tensor"
    BAD_LAYOUT = "bad-layout"
    WRONG_DTYPE = "wrong-dtype"
    TOO_BIG = "too-big"


class TensorFileError(AggregationError):
    """Bytes that are not an acceptable safetensors file; ``reason`` says which rule they break."""

    def __init__(self, reason: TensorFileReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


def save(tensors: Mapping[str, npt.NDArray[Any]], note: str) -> bytes:
    """Safetensors bytes; the same tensors and note give the same bytes.

    Args:
        tensors: arrays by name.
        note: value of the one metadata key, ``format``. One key only: the writer does not order
            several.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return safetensors.numpy.save(arrays, metadata={"format": note})


def load(data: bytes, *, room: int = 1) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Read safetensors bytes.

    Args:
        data: the whole file.
        room: how many times as many tensors, and as long a header, as a payload may have; more
            than 1 for what we wrote ourselves.

    Returns:
        Arrays by name (float64, float32, float16; bfloat16 as float32) that do not alias ``data``,
        and the metadata.

    Raises:
        TensorFileError: on anything outside the rules above.
    """
    header, start = _header(data, room * MAX_HEADER)
    metadata = _metadata(header.pop("__metadata__", {}))
    if len(header) > room * MAX_TENSORS:
        raise _error("TOO_BIG", f"{len(header)} tensors; at most {room * MAX_TENSORS} are allowed")
    entries = [(name, *_entry(name, entry)) for name, entry in header.items()]
    entries.sort(key=lambda item: item[3])
    position = 0
    for name, _, _, begin, end in entries:
        if begin != position:
            raise _error("BAD_LAYOUT", f"{name!r} begins at {begin}, expected {position}")
        position = end
    if position != len(data) - start:
        raise _error("BAD_LAYOUT", f"{len(data) - start} bytes of data, expected {position}")
    return {
        name: _array(data[start + begin : start + end], dtype, shape)
        for name, dtype, shape, begin, end in entries
    }, metadata


def _header(data: bytes, limit: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or length > min(limit, len(data) - 8):
        raise _error("BAD_HEADER", f"header length {length} in a file of {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _error("BAD_HEADER", f"the header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _error("BAD_HEADER", "the header is not an object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _error("DUPLICATE_TENSOR", f"{twice!r} appears twice in the header")
    return out


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _error("BAD_HEADER", "__metadata__ is not an object of strings")
    return value


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _error("BAD_HEADER", f"{name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _error("WRONG_DTYPE", f"{name!r} has dtype {dtype!r}; allowed: {', '.join(_DTYPES)}")
    if not _naturals(shape) or not 1 <= len(shape) <= 8 or not all(0 < n < 1 << 32 for n in shape):
        raise _error("BAD_HEADER", f"{name!r} has shape {shape!r}; expected 1 to 8 positive sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _error("BAD_HEADER", f"{name!r} has data_offsets {offsets!r}; expected two numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise _error("BAD_LAYOUT", f"{name!r} has {end - begin} bytes for {dtype} of shape {shape}")
    return dtype, tuple(shape), begin, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _array(raw: bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    values = np.frombuffer(raw, dtype=_DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _error(reason: str, detail: str) -> TensorFileError:
    return TensorFileError(TensorFileReason[reason], detail[:300])
