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
import stat
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote_to_bytes

import h11
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from federation.metrics import CONTENT_TYPE
from federation.mirror import TIMESTAMP, WRAPS, MirrorError
from federation.mirror_talk import Talk
from federation.published import NotFoundError

log = logging.getLogger("airpeft.federation.mirror")

HEADER_SECONDS = 15.0
STALL_SECONDS = 60.0
BLOCK = 256 * 1024  # bytes that one reader must take within STALL_SECONDS
CONNECTIONS = 512
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
        self._shelf, self._free, self._most = shelf, connections, connections
        self._header_seconds, self._stall_seconds = header_seconds, stall_seconds
        self._server: asyncio.Server | None = None
        self._tls: ssl.SSLContext | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listen; :attr:`port` says where.

        Raises:
            MirrorError: the port is taken.
        """
        self._tls = tls
        try:
            self._server = await asyncio.start_server(self._take, host, port, backlog=1024)
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
            why = "crowded" if self._free < 0 else why
            if self._tls is not None:
                # Counted before the handshake, which one that never ends would escape otherwise.
                if self._free < -self._most:
                    return  # too many even to be told
                async with asyncio.timeout(self._header_seconds):
                    await writer.start_tls(self._tls)
            talk = Talk(reader, writer)
            if self._free < 0:
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

    async def _answer(self, talk: Talk) -> bool:
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
            descriptor = _opened(file)
        except (NotFoundError, FileNotFoundError):
            await self._say(talk, HTTPStatus.NOT_FOUND, {"cache-control": "no-store"})
            return talk.next()
        except (MirrorError, OSError) as error:
            log.warning("%s: %s", path, error)
            await self._say(talk, HTTPStatus.SERVICE_UNAVAILABLE, {"retry-after": "5"})
            return talk.next()
        with descriptor:
            headers = {key.decode(): value.decode("latin-1") for key, value in request.headers}
            about = os.fstat(descriptor.fileno())
            status, own, start, end = _plan(path, headers, about)
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
        self, talk: Talk, status: HTTPStatus, headers: dict[str, str], body: bytes = b""
    ) -> None:
        self.metrics.requests.labels(str(int(status))).inc()
        with contextlib.suppress(h11.LocalProtocolError):
            async with asyncio.timeout(self._stall_seconds):
                await talk.head(status, {**headers, "content-length": str(len(body))}, body)


def _opened(file: Path) -> BinaryIO:
    """An ordinary file; no link is followed, and no pipe waited for.

    Raises:
        NotFoundError: it is something else.
        OSError: it can't be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        found.close()
        raise NotFoundError(f"{file} is not an ordinary file")
    return found


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
