"""Thousands of devices in one process, as far as a server can tell: one HTTP/2 connection each.

They speak just enough of HTTP/2 (RFC 9113) and gRPC to keep a Watch stream open and to fetch a
file, so that what is measured is the server and not a client library. Commands come as JSON lines
on standard input, and each is answered by one line::

    {"do": "connect", "port": 1, "count": 1000, "tls": "folder or empty", "first": 0}
    {"do": "bundles", "at_least": 2, "seconds": 60}       all have seen so many bundles
    {"do": "fetch", "path": "targets/...", "length": 1, "seconds": 60}
    {"do": "http", "port": 1, "path": "...", "length": 1, "count": 1000, "seconds": 60}

With TLS the folder holds ``ca.pem``, ``device.key`` and a certificate ``<number>.pem`` per device.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protos.channel import SERVER_NAME
from protos.generated import fleet_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 2**31 - 1
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
WATCH, BATCH = 1, 100
_RETRY = re.compile(rb"retry-after-ms.(\d+)", re.DOTALL)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing (RFC 7541, section 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call(stream: int, method: str, message: bytes, tls: bool) -> bytes:
    """A whole gRPC request."""
    head = bytes([0x83, 0x87 if tls else 0x86])  # POST, https or http
    head += literal(b":path", f"/airpeft.v1.Fleet/{method}".encode())
    head += literal(b":authority", SERVER_NAME.encode())
    head += literal(b"content-type", b"application/grpc") + literal(b"te", b"trailers")
    body = struct.pack(">BI", 0, len(message)) + message
    return frame(HEADERS, END_HEADERS, stream, head) + frame(DATA, END_STREAM, stream, body)


class Device(asyncio.Protocol):
    """One connection: the Watch stream, and a Fetch now and then."""

    def __init__(self, tls: bool) -> None:
        self.tls, self.bundles, self.lost, self.retries = tls, 0, False, 0
        self.fetched, self.failed = 0, ""
        self.done: asyncio.Future[None] | None = None
        self._buffer, self._message = bytearray(), bytearray()
        self._stream, self._again, self._owed = WATCH, b"", 0

    def connection_made(self, transport: Any) -> None:
        """Greet, and open the Watch stream."""
        self.transport = transport
        settings = struct.pack(">HIHI", 4, WINDOW, 5, 2**20)  # windows, largest frame
        hello = PREFACE + frame(SETTINGS, 0, 0, settings)
        hello += frame(UPDATE, 0, 0, struct.pack(">I", 2**30))
        watch = call(WATCH, "Watch", pb.WatchRequest().SerializeToString(), self.tls)
        transport.write(hello + watch)

    def connection_lost(self, error: Exception | None) -> None:
        """Remember it."""
        self.lost = True
        self._finish("connection lost")

    def fetch(self, path: str) -> asyncio.Future[None]:
        """Start a download; the future ends with it."""
        self.done = asyncio.get_running_loop().create_future()
        self._again = pb.FetchRequest(path=path).SerializeToString()
        self.failed = ""
        self._call()
        return self.done

    def _call(self) -> None:
        self._stream += 2
        self.fetched = 0
        self.transport.write(call(self._stream, "Fetch", self._again, self.tls))

    def data_received(self, data: bytes) -> None:
        """Take frames apart."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= 9:
            length = int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) - at < 9 + length:
                break
            kind, flags, stream = struct.unpack_from(">BBI", buffer, at + 3)
            self._take(kind, flags, stream, at + 9, length)
            at += 9 + length
        del buffer[:at]

    def _take(self, kind: int, flags: int, stream: int, at: int, length: int) -> None:
        if kind == DATA:
            if stream == WATCH:
                self._watched(self._buffer[at : at + length])
            else:
                self.fetched += length
                self._owed += length
                if self._owed > WINDOW // 4:
                    self.transport.write(frame(UPDATE, 0, 0, struct.pack(">I", self._owed)))
                    self._owed = 0
        elif kind == HEADERS and flags & END_STREAM and stream == self._stream != WATCH:
            self._trailers(bytes(self._buffer[at : at + length]))
        elif kind == SETTINGS and not flags & ACK:
            self.transport.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.transport.write(frame(PING, ACK, 0, bytes(self._buffer[at : at + length])))
        elif kind in (RST, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
            self.lost = self.lost or stream in (0, WATCH)
            self._finish("stream ended")

    def _watched(self, data: bytearray) -> None:
        self._message += data
        while len(self._message) >= 5:
            length = int.from_bytes(self._message[1:5], "big")
            if len(self._message) < 5 + length:
                return
            self.bundles += self._message[5] == 0x0A  # field 1: a bundle; field 2: a heartbeat
            del self._message[: 5 + length]

    def _trailers(self, block: bytes) -> None:
        wait = _RETRY.search(block)
        if wait and not self.fetched:
            self.retries += 1
            jitter = random.random() * 0.2  # noqa: S311
            asyncio.get_running_loop().call_later(int(wait[1]) / 1000 + jitter, self._call)
        else:
            self._finish("")

    def _finish(self, why: str) -> None:
        if self.done is not None and not self.done.done():
            self.failed = why
            self.done.set_result(None)


class Reader(asyncio.Protocol):
    """One HTTP/1.1 download, for comparison."""

    def __init__(self, path: str) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.got, self._path = 0, path
        self._head: bytes | None = b""  # until it is whole

    def connection_made(self, transport: Any) -> None:
        """Ask."""
        transport.write(
            f"GET /{self._path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        """Count."""
        if self._head is not None:
            head, found, data = (self._head + data).partition(b"\r\n\r\n")
            self._head = None if found else head
        self.got += len(data)

    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        self.done.set_result(None)


class Crowd:
    """All devices of this process."""

    def __init__(self) -> None:
        self.devices: list[Device] = []

    async def connect(self, port: int, count: int, tls: str, first: int) -> dict[str, Any]:
        """Connect ``count`` devices, some at a time."""
        loop, start = asyncio.get_running_loop(), time.monotonic()

        async def one(number: int) -> None:
            context = _context(Path(tls), number) if tls else None
            name = SERVER_NAME if tls else None
            _, device = await loop.create_connection(
                lambda: Device(bool(tls)),
                "127.0.0.1",
                port,
                ssl=context,
                server_hostname=name,
                ssl_handshake_timeout=120 if tls else None,
            )
            self.devices.append(device)

        for at in range(first, first + count, BATCH):
            await asyncio.gather(*(one(n) for n in range(at, min(at + BATCH, first + count))))
        return {"connected": len(self.devices), "seconds": time.monotonic() - start}

    async def bundles(self, at_least: int, seconds: float) -> dict[str, Any]:
        """Wait until every device has seen so many bundles."""

        def late() -> int:
            return sum(device.bundles < at_least for device in self.devices)

        await _until(lambda: late() == 0, seconds)
        return {"late": late(), "lost": sum(device.lost for device in self.devices)}

    async def fetch(self, path: str, length: int, seconds: float) -> dict[str, Any]:
        """All fetch one file at the same time."""
        start = time.monotonic()
        await asyncio.wait([device.fetch(path) for device in self.devices], timeout=seconds)
        bad = [d for d in self.devices if d.failed or d.fetched < length]
        return {
            "failed": len(bad),
            "why": sorted({d.failed or "short" for d in bad}),
            "retries": sum(d.retries for d in self.devices),
            "seconds": time.monotonic() - start,
        }

    async def http(
        self, port: int, path: str, length: int, count: int, seconds: float
    ) -> dict[str, Any]:
        """The same file over HTTP/1.1, ``count`` connections at once."""
        loop, start = asyncio.get_running_loop(), time.monotonic()
        readers: list[Reader] = []
        for at in range(0, count, BATCH):
            made = [
                loop.create_connection(lambda: Reader(path), "127.0.0.1", port)
                for _ in range(min(BATCH, count - at))
            ]
            readers += [reader for _, reader in await asyncio.gather(*made)]
        await asyncio.wait([reader.done for reader in readers], timeout=seconds)
        short = sum(reader.got != length for reader in readers)
        return {"failed": short, "seconds": time.monotonic() - start}


def _context(folder: Path, number: int) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / f"{number}.pem", folder / "device.key")
    context.set_alpn_protocols(["h2"])
    return context


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.005)


async def main() -> None:
    """Do what standard input says, until it ends."""
    crowd, loop = Crowd(), asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        words = json.loads(line)
        answer = await getattr(crowd, words.pop("do"))(**words)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
