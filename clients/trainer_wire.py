"""How a trainer is spoken to over a Unix socket: frames of a JSON header and packed numbers.

    frame = b"APT2" | header length, 4 bytes | body length, 8 bytes | header | body

Big-endian lengths, bounded before anything is read. The body holds the adapters' float32 values,
one after the other, in the order in which the header names them, and after them blobs of bytes
whose lengths the header gives. Nothing in a frame is executed. What the headers say is made and
read in ``clients.trainer_headers``.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec
from clients.errors import ClientError

MAGIC = b"APT2"
MAX_HEADER = 256 << 20
MAX_BODY = 1 << 30
_PREFIX = struct.Struct(">4sIQ")


class TrainerError(ClientError):
    """The resident trainer cannot be reached, or said something that is not its language."""


@dataclass(frozen=True)
class Frame:
    """One request or answer.

    Attributes:
        header: plain values.
        adapters: the adapters, in the order in which the header speaks of them.
        blobs: further bytes, likewise.
    """

    header: Mapping[str, Any]
    adapters: Sequence[Adapter] = ()
    blobs: Sequence[bytes] = ()


def send(connection: socket.socket, frame: Frame) -> None:
    """Send one frame.

    Raises:
        TrainerError: if it is larger than a frame may be.
    """
    named = {
        "adapters": [{"spec": a.spec.to_json(), "digest": a.digest} for a in frame.adapters],
        "blobs": [len(blob) for blob in frame.blobs],
    }
    head = json.dumps({**frame.header, **named}).encode()
    values = (a.pack().astype("<f4", copy=False).tobytes() for a in frame.adapters)
    body = b"".join([*values, *frame.blobs])
    if len(head) > MAX_HEADER or len(body) > MAX_BODY:
        raise TrainerError("the request is too large: send fewer jobs at once, and data by path")
    connection.sendall(_PREFIX.pack(MAGIC, len(head), len(body)) + head + body)


def receive(connection: socket.socket) -> Frame:
    """Receive one frame.

    Raises:
        TrainerError: if the other side closed early or sent something else.
        AdapterError, SpecError: if an adapter does not fit its specification.
    """
    magic, head_length, body_length = _PREFIX.unpack(_exactly(connection, _PREFIX.size))
    if magic != MAGIC or head_length > MAX_HEADER or body_length > MAX_BODY:
        raise TrainerError("the other side of the socket is not an AirPEFT trainer of this version")
    try:
        header = json.loads(_exactly(connection, head_length))
        named = [(AdapterSpec.from_json(a["spec"]), a["digest"]) for a in header["adapters"]]
        lengths = [int(length) for length in header["blobs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"a malformed header: {error!r}") from None
    body = _exactly(connection, body_length)
    needed = 4 * sum(spec.size for spec, _ in named) + sum(lengths)
    if min(lengths, default=0) < 0 or len(body) != needed:
        raise TrainerError("the body does not hold what the header announces")
    adapters, blobs, start = [], [], 0
    for spec, digest in named:
        adapter = Adapter.unpack(spec, np.frombuffer(body, "<f4", spec.size, start))
        if adapter.digest != digest:
            raise TrainerError("an adapter arrived with another digest than announced")
        adapters.append(adapter)
        start += 4 * spec.size
    for length in lengths:
        blobs.append(body[start : start + length])
        start += length
    return Frame(header, adapters, blobs)


def _exactly(connection: socket.socket, count: int) -> bytes:
    chunks, left = [], count
    while left:
        chunk = connection.recv(min(left, 1 << 20))
        if not chunk:
            raise TrainerError("the other side of the socket closed in the middle of a frame")
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)
