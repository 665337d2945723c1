"""Chunks, the feed, admission, and the way a server binds its port; in this process."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.authority import Authority, AuthorityError, open_authority, server_tls
from federation.broadcast import FLEET, Feed, FleetService
from federation.chunks import CHUNK, ChunkCache, cut
from federation.enrolment import Enrolment
from federation.fleet import Fleet
from federation.metrics import Metrics
from federation.published import NotFoundError
from federation.store import Store
from protos.channel import AddressInUseError, ClientTls, open_aio_channel, serve
from protos.generated import fleet_pb2 as pb
from protos.generated import fleet_pb2_grpc as services
from protos.messages import EnrolRequest, FetchRequest, MetadataBundle, WatchRequest, to_wire
from tests.delivery.rig import key_pem, new_key, request_for

NOW = datetime.now(UTC)


@dataclass
class Station:
    """A fleet service on a port, with what it serves in plain variables."""

    tls: ClientTls
    port: int
    feed: Feed
    metrics: Metrics
    files: dict[str, bytes]


@asynccontextmanager
async def station(folder: Path, downloads: int = 8) -> AsyncIterator[Station]:
    authority = open_authority(folder / "authority", NOW)
    store = Store.open(folder / "fleet.sqlite")
    enrolment = Enrolment(store, authority, lambda: b"root")
    key = new_key()
    token = enrolment.make_token(who="test").secret
    reply = enrolment.enrol(EnrolRequest(token=token, certificate_request=request_for(key)))
    files = {"timestamp.json": b"one"}
    feed, metrics = Feed(lambda after: MetadataBundle(dict(files))), Metrics()
    (folder / "file").write_bytes(b"x" * (5 * CHUNK))

    def locate(path: str) -> Path:
        if path != "file":
            raise NotFoundError(path)
        return folder / path

    chunks = ChunkCache(locate, metrics.altered.inc)
    service = FleetService(
        Fleet(store), feed, chunks, metrics, lambda: None, heartbeat=30.0, downloads=downloads
    )
    tls = server_tls(authority, folder / "authority", NOW, clients=True)
    server = await serve("127.0.0.1", 0, tls, service.register, [FLEET])
    client = ClientTls(authority=authority.pem, key=key_pem(key), certificate=reply.certificate)
    try:
        yield Station(client, server.port, feed, metrics, files)
    finally:
        feed.close()
        await server.stop(0)
        store.close()


def test_many_streams_at_once_all_hear_each_change(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with station(tmp_path) as here:
            channels = [open_aio_channel(f"127.0.0.1:{here.port}", here.tls) for _ in range(3)]
            calls: list[Any] = [
                services.FleetStub(channels[number % 3]).Watch(to_wire(WatchRequest()))
                for number in range(150)
            ]
            async with asyncio.timeout(120):
                first = await asyncio.gather(*(call.read() for call in calls))
                here.files["timestamp.json"] = b"two"
                here.feed.wake()
                second = await asyncio.gather(*(call.read() for call in calls))
            assert {event.bundle.files["timestamp.json"] for event in first} == {b"one"}
            assert {event.bundle.files["timestamp.json"] for event in second} == {b"two"}
            assert here.metrics.streams._value.get() == 150
            here.feed.close()
            async with asyncio.timeout(120):
                ends = await asyncio.gather(*(call.code() for call in calls))
            assert set(ends) == {grpc.StatusCode.UNAVAILABLE}
            for channel in channels:
                await channel.close()

    asyncio.run(scenario())


def test_a_download_too_many_is_told_when_to_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            station(tmp_path, downloads=1) as here,
            open_aio_channel(f"127.0.0.1:{here.port}", here.tls) as channel,
        ):
            stub = services.FleetStub(channel)
            async with asyncio.timeout(120):
                for _ in range(3):  # a place is given back, however the download ends
                    call: Any = stub.Fetch(to_wire(FetchRequest("file")))
                    assert sum([len(chunk.data) async for chunk in call]) == 5 * CHUNK
                    missing: Any = stub.Fetch(to_wire(FetchRequest("nothing")))
                    assert await missing.code() is grpc.StatusCode.NOT_FOUND
        async with (
            station(tmp_path, downloads=0) as here,
            open_aio_channel(f"127.0.0.1:{here.port}", here.tls) as channel,
        ):
            call = services.FleetStub(channel).Fetch(to_wire(FetchRequest("file")))
            async with asyncio.timeout(120):
                assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                trailing = dict(await call.trailing_metadata())
            assert 500 <= int(trailing["retry-after-ms"]) < 3000  # one turned away, of no places

    asyncio.run(scenario())


def test_a_taken_port_fails_at_once_and_a_free_one_is_named(tmp_path: Path) -> None:
    authority = open_authority(tmp_path, NOW)
    tls = server_tls(authority, tmp_path, NOW, clients=False)

    async def scenario() -> None:
        first = await serve("127.0.0.1", 0, tls, lambda server: None, [])
        assert first.port > 0
        with pytest.raises(AddressInUseError, match=rf"127\.0\.0\.1:{first.port}"):
            await serve("127.0.0.1", first.port, tls, lambda server: None, [])
        await first.stop(0)
        again = await serve("127.0.0.1", first.port, tls, lambda server: None, [])
        await again.stop(0)
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            with pytest.raises(AddressInUseError):
                await serve("127.0.0.1", holder.getsockname()[1], tls, lambda server: None, [])

    asyncio.run(scenario())


# --- chunks ---------------------------------------------------------------------------------------


@given(st.integers(0, 3 * CHUNK + 5), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_file_from_any_offset_is_the_rest_of_it(length: int, share: float) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    offset = int(share * length)
    messages = list(cut(data).after(offset))
    parts = [pb.Chunk.FromString(message).data for message in messages]
    assert b"".join(parts) == data[offset:]
    assert all(0 < len(part) <= CHUNK for part in parts)


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., tuple[ChunkCache, list[str], list[int]]]:
    def make(limit: int) -> tuple[ChunkCache, list[str], list[int]]:
        asked: list[str] = []
        altered: list[int] = []

        def locate(path: str) -> Path:
            asked.append(path)
            return tmp_path / path

        return ChunkCache(locate, lambda: altered.append(1), limit), asked, altered

    return make


def test_a_file_is_loaded_once_for_all_and_the_oldest_goes_first(
    tmp_path: Path, cache: Callable[..., Any]
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 1000)

    async def scenario() -> None:
        chunks, _, _ = cache(2500)
        all_a = await asyncio.gather(*(chunks.get("a") for _ in range(20)))
        assert len({id(one) for one in all_a}) == 1
        await chunks.get("b")
        assert await chunks.get("a") is all_a[0]  # used again: b is the oldest now
        await chunks.get("c")
        assert await chunks.get("a") is all_a[0]
        assert [key[0] for key in chunks._files] == ["c", "a"]

    asyncio.run(scenario())


def test_a_file_that_changed_on_the_disk_is_served_as_it_is_and_told(
    tmp_path: Path, cache: Callable[..., Any]
) -> None:
    name = f"{hashlib.sha256(b'honest').hexdigest()}.1.airpeft"
    (tmp_path / name).write_bytes(b"honest")

    async def scenario() -> None:
        chunks, _, altered = cache(10_000)
        assert list((await chunks.get(name)).after(0)) == list(cut(b"honest").after(0))
        assert altered == []
        (tmp_path / name).write_bytes(b"something else")
        assert list((await chunks.get(name)).after(0)) == list(cut(b"something else").after(0))
        assert altered == [1]

    asyncio.run(scenario())


# --- the authority --------------------------------------------------------------------------------


def test_the_authority_is_made_once_and_finishes_what_a_kill_left(tmp_path: Path) -> None:
    first = open_authority(tmp_path, NOW)
    assert open_authority(tmp_path, NOW).pem == first.pem
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "ca.pem").unlink()  # killed between the key and the certificate
    again: Authority = open_authority(tmp_path, NOW)
    assert again.key.private_numbers() == first.key.private_numbers()
    (tmp_path / "ca.key").unlink()
    with pytest.raises(AuthorityError, match=r"ca\.key"):
        open_authority(tmp_path, NOW)
    assert "PRIVATE" not in repr(again)


def test_a_server_certificate_near_its_end_is_renewed(tmp_path: Path) -> None:
    authority = open_authority(tmp_path, NOW)
    first = server_tls(authority, tmp_path, NOW, clients=False)
    assert server_tls(authority, tmp_path, NOW, clients=False) == first
    later = NOW + timedelta(days=365)
    assert server_tls(authority, tmp_path, later, clients=False).certificate != first.certificate
