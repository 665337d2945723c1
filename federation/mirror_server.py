"""Static files over HTTP/1.1 with Range: a plain mirror that needs no key and no database.

GET and HEAD of a repository's paths, nothing else. The kernel sends the bytes (``sendfile``) where
there is no TLS. Nobody can hold a place for nothing: a request line must come within
``HEADER_SECONDS``, and each block must be taken within ``STALL_SECONDS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import os
import re
import ssl
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote_to_bytes

import h11
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from federation.metrics import CONTENT_TYPE
from federation.mirror import TIMESTAMP, WRAPS, MirrorError
from federation.published import NotFoundError

log = logging.getLogger("airpeft.federation.mirror")

HEADER_SECONDS = 15.0
STALL_SECONDS = 60.0
BLOCK = 256 * 1024  # bytes that one reader must take within STALL_SECONDS
CONNECTIONS = 512
HEADERS_MAX = 8 * 1024  # bytes
CLOSE = {"connection": "close"}
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z", re.ASCII)


class Shelf(Protocol):
    """Where the files are."""

    async def find(self, path: str) -> Path:
        """The file behind a path.

        Raises:
            NotFoundError: there is none.
            MirrorError: it cannot be had now.
        """


class MirrorMetrics:
    """What a mirror counts; shown under ``/metrics``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "airpeft_mirror_requests", "Requests by status.", ["status"], registry=self.registry
        )
        self.sent = Counter("airpeft_mirror_sent_bytes", "Bytes sent.", registry=self.registry)
        self.dropped = Counter(
            "airpeft_mirror_dropped",
            "Connections dropped, by why.",
            ["why"],
            registry=self.registry,
        )
        self.open = Gauge("airpeft_mirror_connections", "Open connections.", registry=self.registry)


class MirrorServer:
    """Serves one shelf.

    Args:
        shelf: where the files are.
        connections: open at once; one more is turned away with 503.
        header_seconds: for a request's header to arrive.
        stall_seconds: for one block to be taken.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        connections: int = CONNECTIONS,
        header_seconds: float = HEADER_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.metrics = MirrorMetrics()
        self._shelf, self._free = shelf, connections
        self._header_seconds, self._stall_seconds = header_seconds, stall_seconds
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listen; :attr:`port` says where.

        Raises:
            MirrorError: the port is taken.
        """
        try:
            self._server = await asyncio.start_server(self._take, host, port, ssl=tls, backlog=1024)
        except OSError as error:
            raise MirrorError(
                f"cannot listen on {host}:{port}: {error.strerror}: choose another port, or 0 for"
                " a free one"
            ) from error
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Take nothing more and cut what is open."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        self._free -= 1
        self.metrics.open.inc()
        why = "cut"
        try:
            talk = _Talk(reader, writer)
            if self._free < 0:
                why = "crowded"
                await self._say(talk, HTTPStatus.SERVICE_UNAVAILABLE, {"retry-after": "2", **CLOSE})
                return
            while await self._answer(talk):
                pass
            why = ""
        except TimeoutError:
            why = "slow"
        except (ConnectionError, ssl.SSLError, h11.LocalProtocolError):
            why = "cut"
        except asyncio.CancelledError:
            why = "stopped"
        finally:
            self._free += 1
            self.metrics.open.dec()
            if why:
                self.metrics.dropped.labels(why).inc()
            if why in ("", "crowded"):
                writer.close()
            else:
                writer.transport.abort()  # closing would wait for a reader that reads nothing
            if task is not None:
                self._tasks.discard(task)

    async def _answer(self, talk: _Talk) -> bool:
        """One request and its answer; whether another may follow."""
        try:
            async with asyncio.timeout(self._header_seconds):
                request = await talk.request()
        except h11.RemoteProtocolError as error:
            await self._say(talk, HTTPStatus(error.error_status_hint), CLOSE)
            return False
        if request is None:
            return False
        path = unquote_to_bytes(request.target.partition(b"?")[0]).decode("latin-1").lstrip("/")
        if request.method not in (b"GET", b"HEAD"):
            await self._say(talk, HTTPStatus.METHOD_NOT_ALLOWED, {"allow": "GET, HEAD", **CLOSE})
            return False
        if path == "metrics":
            text = generate_latest(self.metrics.registry)
            await self._say(talk, HTTPStatus.OK, {"content-type": CONTENT_TYPE}, text)
            return talk.next()
        try:
            file = await self._shelf.find(path)
            descriptor = file.open("rb")
        except (NotFoundError, FileNotFoundError):
            await self._say(talk, HTTPStatus.NOT_FOUND, {"cache-control": "no-store"})
            return talk.next()
        except (MirrorError, OSError) as error:
            log.warning("%s: %s", path, error)
            await self._say(talk, HTTPStatus.SERVICE_UNAVAILABLE, {"retry-after": "5"})
            return talk.next()
        with descriptor:
            headers = {key.decode(): value.decode("latin-1") for key, value in request.headers}
            stat = os.fstat(descriptor.fileno())
            status, own, start, end = _plan(path, headers, stat)
            self.metrics.requests.labels(str(int(status))).inc()
            async with asyncio.timeout(self._stall_seconds):
                await talk.head(status, own)
            if request.method == b"GET":
                while start < end:
                    async with asyncio.timeout(self._stall_seconds):
                        sent = await talk.body(descriptor, start, min(BLOCK, end - start))
                    if sent == 0:
                        raise ConnectionResetError(f"{path} became shorter")
                    start += sent
                    self.metrics.sent.inc(sent)
        return talk.next()

    async def _say(
        self, talk: _Talk, status: HTTPStatus, headers: dict[str, str], body: bytes = b""
    ) -> None:
        self.metrics.requests.labels(str(int(status))).inc()
        with contextlib.suppress(h11.LocalProtocolError):
            async with asyncio.timeout(self._stall_seconds):
                await talk.head(status, {**headers, "content-length": str(len(body))}, body)


class _Talk:
    """One connection: h11 says what the bytes mean, asyncio carries them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._state = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADERS_MAX)
        self._head_only = False

    async def request(self) -> h11.Request | None:
        """The next request with all that belongs to it; None at the end."""
        found: h11.Request | None = None
        while True:
            event = self._state.next_event()
            if event is h11.NEED_DATA:
                self._state.receive_data(await self._reader.read(4096))
            elif isinstance(event, h11.Request):
                found = event
                self._head_only = event.method == b"HEAD"
            elif isinstance(event, h11.Data):
                raise h11.RemoteProtocolError("a body was not asked for", 413)
            else:  # EndOfMessage, ConnectionClosed, PAUSED
                return found

    async def head(self, status: HTTPStatus, headers: dict[str, str], body: bytes = b"") -> None:
        """Status and headers, and a short body if there is one."""
        lines = list({"server": "airpeft-mirror", **headers}.items())
        self._writer.write(
            self._state.send(
                h11.Response(status_code=int(status), headers=lines, reason=status.phrase.encode())
            )
            or b""
        )
        if body and not self._head_only:
            self._writer.write(self._state.send(h11.Data(data=body)) or b"")
        await self._writer.drain()

    async def body(self, file: BinaryIO, start: int, count: int) -> int:
        """Bytes of a file, by the kernel where that is possible; how many were sent."""
        loop = asyncio.get_running_loop()
        extent: Any = _Extent(count)
        self._state.send_with_data_passthrough(h11.Data(data=extent))
        return await loop.sendfile(self._writer.transport, file, start, count)

    def next(self) -> bool:
        """End this answer; whether the connection may carry another request."""
        if self._state.our_state is h11.SEND_BODY:
            self._state.send(h11.EndOfMessage())
        if self._state.our_state is h11.DONE and self._state.their_state is h11.DONE:
            self._state.start_next_cycle()
            return True
        return False


class _Extent:
    """Stands for so many bytes that the kernel sends."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def _plan(
    path: str, headers: dict[str, str], stat: os.stat_result
) -> tuple[HTTPStatus, dict[str, str], int, int]:
    """Status, headers, and the bytes to send, from the request's conditions (RFC 9110)."""
    size, etag = stat.st_size, f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    changes = path == TIMESTAMP or WRAPS.match(path)
    own = {
        "etag": etag,
        "accept-ranges": "bytes",
        "last-modified": email.utils.formatdate(stat.st_mtime, usegmt=True),
        "content-type": "application/json"
        if path.endswith(".json")
        else "application/octet-stream",
        "cache-control": "no-cache" if changes else "public, max-age=31536000, immutable",
    }
    if etag in headers.get("if-none-match", ""):
        return HTTPStatus.NOT_MODIFIED, own, 0, 0
    found = _RANGE.match(headers.get("range", "").replace(" ", ""))
    if found and (found[1] or found[2]) and headers.get("if-range", etag) == etag:
        start = int(found[1]) if found[1] else max(0, size - int(found[2]))
        end = min(size, int(found[2]) + 1) if found[1] and found[2] else size
        if start >= end:
            own |= {"content-range": f"bytes */{size}", "content-length": "0"}
            return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, own, 0, 0
        own |= {
            "content-range": f"bytes {start}-{end - 1}/{size}",
            "content-length": str(end - start),
        }
        return HTTPStatus.PARTIAL_CONTENT, own, start, end
    return HTTPStatus.OK, {**own, "content-length": str(size)}, 0, size
