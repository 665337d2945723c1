"""One connection to a mirror: h11 says what the bytes mean, asyncio carries them."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, BinaryIO

import h11

HEADERS_MAX = 8 * 1024  # bytes


class Talk:
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
