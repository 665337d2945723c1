"""What a server must survive of its clients, by raw HTTP/2: storms, pings, readers that don't read.

Without TLS, which raw clients would have to speak too; options and services are the product's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from federation.broadcast import Feed, FleetService
from federation.chunks import ChunkCache
from federation.fleet import Fleet
from federation.metrics import Metrics
from federation.store import Store
from protos.channel import server_options
from protos.generated import fleet_pb2 as pb
from protos.messages import MetadataBundle
from simulations.stream_devices import (
    DATA,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    SETTINGS,
    Crowd,
    call,
    frame,
)

SIZE = 32 * 1024 * 1024


class Service(FleetService):
    async def _admit(self, context: Any) -> tuple[str, str]:
        return "device", "serial"


class Open(Fleet):
    def admits(self, device_id: str, serial: str) -> bool:
        return True


@asynccontextmanager
async def station(
    folder: Path, options: Sequence[tuple[str, int]] = (), **limits: Any
) -> AsyncIterator[tuple[int, Feed, Metrics]]:
    store, metrics = Store.open(folder / "fleet.sqlite"), Metrics()
    feed = Feed(lambda after: MetadataBundle({"timestamp.json": b"x" * 2000}))
    (folder / "big").touch()
    os.truncate(folder / "big", SIZE)  # of zeros, which cost nothing to make
    chunks = ChunkCache(lambda path: folder / path, lambda: None)
    service = Service(Open(store), feed, chunks, metrics, lambda: None, **limits)
    server = grpc.aio.server(options=[*options, *server_options()])  # the first of a name holds
    service.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port, feed, metrics
    finally:
        feed.close()
        await server.stop(0)
        store.close()


def stalled(metrics: Metrics) -> float:
    return float(metrics.refused.labels("fetch", "slow-reader")._value.get())


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, int, int, bytes]]:
    while head := await reader.read(9):
        if len(head) < 9:
            head += await reader.readexactly(9 - len(head))
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        yield kind, flags, stream, await reader.readexactly(int.from_bytes(head[:3], "big"))


async def dial(port: int, window: int = 65_535) -> tuple[Any, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)))
    return reader, writer


def test_a_fleet_that_comes_back_at_once_is_taken_up_whole(tmp_path: Path) -> None:
    """gRPC's own limit cancels calls beyond 1,000 that wait to be taken up."""

    async def scenario() -> None:
        # On a slow machine 2,000 calls take long; that they wait for long is another matter.
        patient = [("grpc.server_max_unrequested_time_in_server", 600)]
        limits = {"request": 600.0, "stall": 600.0}
        async with station(tmp_path, patient, **limits) as (port, _, _):
            watch = pb.WatchRequest().SerializeToString()
            seen: set[tuple[int, int]] = set()

            async def storm(number: int) -> None:
                reader, writer = await dial(port)
                update = frame(8, 0, 0, struct.pack(">I", 2**30))
                calls = (call(1 + 2 * n, "Watch", watch, False) for n in range(100))
                writer.write(update + b"".join(calls))
                async for kind, flags, stream, _ in frames(reader):
                    if kind == DATA:
                        seen.add((number, stream))
                    assert not (kind == HEADERS and flags & 1), "turned away"
                    if sum(1 for one in seen if one[0] == number) == 100:
                        break
                writer.close()

            async with asyncio.timeout(120):
                await asyncio.gather(*(storm(number) for number in range(20)))
            assert len(seen) == 2000

    asyncio.run(scenario())


def test_many_pings_are_answered_and_not_punished(tmp_path: Path) -> None:
    """A default server says GOAWAY "too_many_pings" to devices that look after their link."""

    async def scenario() -> None:
        async with station(tmp_path) as (port, _, _):
            reader, writer = await dial(port)
            writer.write(b"".join(frame(PING, 0, 0, n.to_bytes(8, "big")) for n in range(50)))
            answered = 0
            async with asyncio.timeout(120):
                async for kind, flags, _, _ in frames(reader):
                    assert kind != GOAWAY
                    answered += kind == PING and flags & 1
                    if answered == 50:
                        break
            writer.close()

    asyncio.run(scenario())


def test_a_reader_that_does_not_read_loses_its_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        # Five seconds: a reader that does read is not as slow on any machine.
        limits = {"downloads": 1, "stall": 5.0, "patience": 60.0}
        async with station(tmp_path, **limits) as (port, _, metrics):
            big = pb.FetchRequest(path="big").SerializeToString()
            _, idle = await dial(port, window=1000)
            idle.write(call(1, "Fetch", big, False))
            while metrics.fetched._value.get() == 0 and stalled(metrics) == 0:
                await asyncio.sleep(0.01)
            crowd = Crowd()
            await crowd.connect(port, 2, "", 0)
            async with asyncio.timeout(120):
                found = await crowd.fetch("big", SIZE, 100)
            assert found["failed"] == 0
            assert stalled(metrics) == 1
            idle.close()

    asyncio.run(scenario())


def refused(metrics: Metrics, call: str, reason: str) -> float:
    return float(metrics.refused.labels(call, reason)._value.get())


@pytest.mark.parametrize("method", ["Watch", "Fetch", "Report"])
@pytest.mark.parametrize("sends", ["nothing", "a drip", "half a message and no more"])
def test_a_writer_that_does_not_write_loses_its_place(
    tmp_path: Path, method: str, sends: str
) -> None:
    """gRPC itself waits for ever for the first request of a call, and calls no handler."""

    async def scenario() -> None:
        limits = {"request": 0.15, "heartbeat": 600.0}
        async with station(tmp_path, **limits) as (port, _, metrics):
            reader, writer = await dial(port)
            whole = call(1, method, b"x" * 1000, False)
            head = 9 + int.from_bytes(whole[:3], "big")
            writer.write(whole[:head])
            if sends == "half a message and no more":
                writer.write(frame(DATA, 0, 1, whole[head + 9 : head + 300]))

            async def drip() -> None:
                writer.write(frame(DATA, 0, 1, struct.pack(">BI", 0, 1000)))
                while True:
                    writer.write(frame(DATA, 0, 1, b"x"))
                    await asyncio.sleep(0.01)

            dripping = asyncio.create_task(drip()) if sends == "a drip" else None
            async with asyncio.timeout(120):
                async for kind, flags, stream, _ in frames(reader):
                    if kind == HEADERS and stream == 1 and flags & 1:
                        break
            assert refused(metrics, method.lower(), "slow-writer") == 1
            assert metrics.streams._value.get() == 0
            if dripping is not None:
                dripping.cancel()
            writer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("begins", [0, 20, 60], ids=["nothing", "a preface", "half the headers"])
def test_a_connection_without_a_call_is_closed(tmp_path: Path, begins: int) -> None:
    async def scenario() -> None:
        options = [("grpc.max_connection_idle_ms", 200), ("grpc.server_handshake_timeout_ms", 200)]
        async with station(tmp_path, options=options) as (port, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            hello = PREFACE + frame(SETTINGS, 0, 0)
            hello += call(1, "Report", b"", False)[: begins if begins > 20 else 0]
            writer.write(hello if begins else b"")
            with contextlib.suppress(ConnectionResetError):
                async with asyncio.timeout(120):
                    while await reader.read(65_536):
                        pass
            writer.close()

    asyncio.run(scenario())


def test_a_stream_that_is_not_read_is_ended(tmp_path: Path) -> None:
    """A Watch stream whose window is full must not hide a revocation for ever."""

    async def scenario() -> None:
        async with station(tmp_path, stall=0.2, heartbeat=600.0) as (port, _, metrics):
            _, writer = await dial(port, window=100)
            writer.write(call(1, "Watch", b"", False))
            async with asyncio.timeout(120):
                while refused(metrics, "watch", "slow-reader") == 0:
                    await asyncio.sleep(0.01)
            assert metrics.streams._value.get() == 0
            writer.close()

    asyncio.run(scenario())


class Writing:
    """A stream to which a change comes while the event before it is being written."""

    def __init__(self, change: Callable[[], None]) -> None:
        self.written: list[bytes] = []
        self._change = change

    async def read(self) -> bytes:
        return b""

    async def write(self, message: bytes) -> None:
        self.written.append(message)
        if len(self.written) == 1:
            self._change()
        await asyncio.sleep(0)


def test_no_change_is_missed_by_a_stream_that_is_being_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        files = {"timestamp.json": b"one"}
        store, feed = Store.open(tmp_path / "fleet.sqlite"), Feed(lambda _: MetadataBundle(files))
        chunks = ChunkCache(lambda path: tmp_path / path, lambda: None)
        service = Service(Open(store), feed, chunks, Metrics(), lambda: None, heartbeat=600.0)

        def change() -> None:
            files["timestamp.json"] = b"two"
            feed.wake()

        stream = Writing(change)
        watching = asyncio.create_task(service.watch(stream))
        async with asyncio.timeout(120):
            while len(stream.written) < 2:
                await asyncio.sleep(0.01)
        assert b"two" in stream.written[1]
        watching.cancel()
        store.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("crowd", [1, 50])
def test_the_wait_that_is_asked_for_grows_with_the_crowd(tmp_path: Path, crowd: int) -> None:
    async def scenario() -> None:
        store = Store.open(tmp_path / "fleet.sqlite")
        feed = Feed(lambda after: MetadataBundle({}))
        chunks = ChunkCache(lambda path: tmp_path / path, lambda: None)
        service = Service(Open(store), feed, chunks, Metrics(), lambda: None, downloads=1)
        waits = [service._return_ms() for _ in range(crowd)]
        assert all(500 <= wait <= 2000 + 1000 * crowd / 8 for wait in waits)
        assert crowd == 1 or max(waits) > 2000
        store.close()

    asyncio.run(scenario())
