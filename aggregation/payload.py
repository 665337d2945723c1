r"""An adapter as bytes for delivery: small, self-describing, and safe to open.

Layout, little-endian::

    8 bytes   magic "airpeft\0"
    1 byte    version, 1
    1 byte    dtype: 1 bf16, 2 f32, 3 int8
    4 bytes   length n of the specification
    n bytes   canonical specification (JSON)
    rest      one zstd frame (RFC 8878) with the body, whose length the specification fixes

The body is all tensors in canonical order with their bytes shuffled (first bytes of all values,
then second bytes, ...), which is what makes floats compressible. int8 has a scale for each block
of up to 128 values of one rank direction.

Nothing is interpreted before it is checked: the specification's digest before its JSON is parsed,
the frame's extent before it is decompressed, and decompression stops at the length that the
specification allows (a cap of our own: zstandard ignores its cap when a frame states its size).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal, Protocol

import zstandard

from aggregation import values
from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec

MAGIC = b"airpeft\0"
VERSION = 1
LEVEL = 3
MAX_WINDOW = 1 << 23
_CODES = {"bf16": 1, "f32": 2, "int8": 3}
_NAMES = {code: name for name, code in _CODES.items()}
_FIXED = len(MAGIC) + 6

Dtype = Literal["bf16", "f32", "int8"]


class PayloadError(AggregationError):
    """Bytes that do not decode to the expected adapter within their limits."""


@dataclass(frozen=True)
class PayloadLimits:
    """The most that a payload may cost its receiver.

    Attributes:
        max_bytes: length of the payload.
        max_plain: length of the decompressed body, in bytes.
        max_spec: length of the specification, in bytes.
    """

    max_bytes: int = 512 << 20
    max_plain: int = 1 << 30
    max_spec: int = 4 << 20


@dataclass(frozen=True)
class Payload:
    """An encoded adapter.

    Attributes:
        data: the bytes to deliver.
        sha256: their digest, as hex.
        length: their number.
        adapter_digest: digest of the adapter as decoded, that is after rounding.
        plain_length: bytes of the body before compression.
    """

    data: bytes
    sha256: str
    length: int
    adapter_digest: str
    plain_length: int


def encode(adapter: Adapter, *, dtype: Dtype = "bf16") -> Payload:
    """Encode an adapter; the same adapter and dtype give the same bytes.

    Args:
        adapter: what to deliver.
        dtype: ``bf16`` (relative rounding 2^-8), ``f32`` (lossless), or ``int8`` (blocks of 128).

    Raises:
        PayloadError: unknown dtype, or values that are not finite, or not after rounding.
    """
    if dtype not in _CODES:
        raise PayloadError(f"dtype {dtype!r} is not one of {', '.join(_CODES)}")
    if not adapter.is_finite():
        raise PayloadError("the adapter has values that are NaN or infinite; nothing to deliver")
    spec_json = adapter.spec.to_json().encode()
    body = values.pack(adapter, dtype)
    decoded = values.unpack(adapter.spec, dtype, body)
    if not decoded.is_finite():
        raise PayloadError(f"values overflow {dtype}; use dtype='f32'")
    frame = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(body)
    head = MAGIC + bytes([VERSION, _CODES[dtype]]) + len(spec_json).to_bytes(4, "little")
    data = head + spec_json + frame
    return Payload(data, digest_of(data), len(data), decoded.digest, len(body))


class Readable(Protocol):
    """All that is asked of a file to decode from."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes."""


def decode(
    data: bytes | Readable,
    *,
    spec_digest: str,
    adapter_digest: str,
    limits: PayloadLimits | None = None,
) -> Adapter:
    """Decode a payload, all or nothing.

    Args:
        data: the payload, or a file open for reading at its start.
        spec_digest: the signed digest of the specification.
        adapter_digest: the signed digest of the decoded adapter.
        limits: the most that decoding may cost.

    Returns:
        The adapter whose digest is ``adapter_digest``.

    Raises:
        PayloadError: saying which check failed; nothing has been made.
    """
    limits = limits or PayloadLimits()
    raw = _bounded(data, limits)
    spec, dtype, start = _open(raw, spec_digest, limits)
    length = values.packed_length(spec, dtype)
    if length > limits.max_plain:
        raise PayloadError(f"the body has {length} bytes; at most {limits.max_plain} are allowed")
    body = _decompress(raw[start:], length)
    try:
        adapter = values.unpack(spec, dtype, body)
    except AggregationError as error:
        raise PayloadError(f"the body does not decode: {error}") from None
    if not hmac.compare_digest(adapter.digest, adapter_digest):
        raise PayloadError(f"the adapter has digest {adapter.digest}, expected {adapter_digest}")
    return adapter


def digest_of(data: bytes) -> str:
    """What a payload is known by: its SHA-256, as hex."""
    return hashlib.sha256(data).hexdigest()


def peek_spec(data: bytes | Readable, spec_digest: str) -> AdapterSpec:
    """The specification of a payload, checked against its signed digest; the body stays closed.

    Raises:
        PayloadError: if the head is malformed or the digest is another.
    """
    limits = PayloadLimits()
    return _open(_bounded(data, limits), spec_digest, limits)[0]


def _bounded(data: bytes | Readable, limits: PayloadLimits) -> bytes:
    raw = data if isinstance(data, bytes) else data.read(limits.max_bytes + 1)
    if len(raw) > limits.max_bytes:
        raise PayloadError(f"the payload is larger than {limits.max_bytes} bytes")
    return raw


def _open(raw: bytes, spec_digest: str, limits: PayloadLimits) -> tuple[AdapterSpec, str, int]:
    if len(raw) < _FIXED or raw[:8] != MAGIC:
        raise PayloadError("not an adapter payload: the first bytes are wrong")
    version, code = raw[8], raw[9]
    if version != VERSION or code not in _NAMES:
        raise PayloadError(f"payload version {version}, dtype {code} is unknown; update the agent")
    length = int.from_bytes(raw[10:14], "little")
    if length > min(limits.max_spec, len(raw) - _FIXED):
        raise PayloadError(f"specification length {length} is beyond the payload or its limit")
    spec_json = raw[_FIXED : _FIXED + length]
    digest = "sha256:" + hashlib.sha256(spec_json).hexdigest()
    if not hmac.compare_digest(digest, spec_digest):
        raise PayloadError(f"the specification has digest {digest}, expected {spec_digest}")
    try:
        spec = AdapterSpec.from_json(spec_json)
    except AggregationError as error:
        raise PayloadError(f"the specification does not parse: {error}") from None
    if not hmac.compare_digest(spec.digest, spec_digest):
        raise PayloadError("the specification is not in canonical form")
    return spec, _NAMES[code], _FIXED + length


def _decompress(frame: bytes, length: int) -> bytes:
    """Exactly ``length`` bytes out of exactly one frame."""
    _check_extent(frame, length)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    try:
        with decompressor.stream_reader(frame, read_across_frames=False) as reader:
            body = reader.read(length + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise PayloadError(f"the body does not decompress: {error}") from None
    if len(body) != length:
        more = "more" if len(body) > length else f"{len(body)}"
        raise PayloadError(f"the body has {more} bytes, expected {length}")
    return body


def _check_extent(frame: bytes, length: int) -> None:
    """Walk the block headers (RFC 8878, 3.1.1.2): the frame must end where the payload ends."""
    try:
        parameters = zstandard.get_frame_parameters(frame)
        position = zstandard.frame_header_size(frame)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the body is not a zstd frame: {error}") from None
    if parameters.content_size != length or parameters.dict_id:
        raise PayloadError(
            f"the frame announces {parameters.content_size} bytes, expected {length}"
        )
    last = False
    while not last:
        head = int.from_bytes(frame[position : position + 3], "little")
        last, kind, size = bool(head & 1), (head >> 1) & 3, head >> 3
        position += 3 + (1 if kind == 1 else size)
        if position > len(frame) or kind == 3:
            raise PayloadError("the body is cut short or damaged")
    if position + (4 if parameters.has_checksum else 0) != len(frame):
        raise PayloadError("there are bytes after the end of the body, or too few")
