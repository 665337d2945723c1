"""Mirrors, sticks and upstreams that mean harm: endless, dripping, linked, or huge."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from clients.connection import ConnectionLost, Denied
from clients.https import HttpsMirror
from clients.mirrors import FolderMirror, whole
from clients.sources import read_bundle
from federation.mirror import FolderShelf, MirrorError, export_mirror
from federation.relay import RelayShelf
from tests.delivery.mirrors import BODY, HEADERS, Dripping, serving
from tests.delivery.test_mirror import World, stick, world
from tests.waiting import until

__all__ = ["stick", "world"]  # fixtures

TIMESTAMP = "metadata/timestamp.json"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


@pytest.mark.parametrize("at_once", [HEADERS, BODY], ids=["headers", "metadata"])
def test_a_mirror_that_drips_does_not_keep_a_device(world: World, at_once: bytes) -> None:
    """Never silent, never at an end: the fleet and all other sources would not be asked again."""
    with Dripping(world.tls, at_once) as rogue, within(8):
        bad = HttpsMirror(rogue.url, authorities=[world.authority.pem], patience=0.5, grace=0.4)
        with pytest.raises(ConnectionLost):
            bad.read(TIMESTAMP, 16_384)
        assert rogue.ended.wait(5), "and it is hung up on"
        bad.close()


def test_metadata_that_comes_too_slowly_is_given_up() -> None:
    now = iter(range(0, 10_000, 5))
    with pytest.raises(ConnectionLost, match="too slow"):
        whole(iter([b"x"] * 100), 1000, "it", grace=30.0, clock=lambda: float(next(now)))
    now = iter(range(0, 10_000, 5))
    fast = iter([bytes(6000)] * 100)
    assert len(whole(fast, 1_000_000, "it", clock=lambda: float(next(now)))) == 600_000


def test_a_mirror_takes_so_much_memory_and_time_and_no_more(stick: Path) -> None:
    """A snapshot may name 128 files of 5 MB each; a device has not got that much."""
    read: list[int] = []

    class Counted(FolderMirror):
        def read(self, path: str, limit: int) -> bytes:
            data = super().read(path, limit)
            read.append(len(data))
            return data

    listed = ",".join(f'"r{n}.json":{{"version":1}}' for n in range(100))
    for name, meta in (("timestamp", '"snapshot.json":{"version":7}'), ("7.snapshot", listed)):
        (stick / "metadata" / f"{name}.json").write_text(f'{{"signed":{{"meta":{{{meta}}}}}}}')
    for number in range(100):
        with (stick / "metadata" / f"1.r{number}.json").open("wb") as file:
            file.truncate(4_900_000)
    with pytest.raises(ConnectionLost, match="longer than"):
        read_bundle(Counted(stick), 9)
    assert sum(read) < 16 * 2**20
    now = iter(range(0, 100_000, 100))
    with pytest.raises(ConnectionLost, match="after 600 seconds"):
        read_bundle(FolderMirror(stick), 9, clock=lambda: float(next(now)))


def test_links_lead_nowhere(stick: Path, tmp_path: Path, world: World) -> None:
    """Neither a device that reads a stick nor a server that hands one out follows any."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "8.root.json").write_text("a private key, say")
    (stick / "metadata" / "9.root.json").symlink_to(secret / "8.root.json")
    (stick / "wraps").symlink_to(secret)
    (secret / f"{'a' * 64}.wraps").write_text("another")
    paths = ("metadata/9.root.json", f"wraps/{'a' * 64}.wraps")
    for path in paths:
        with pytest.raises(Denied, match="link"):
            FolderMirror(stick).read(path, 1000)
    (tmp_path / "plugged").symlink_to(stick)  # which the owner has put there is all right
    assert FolderMirror(tmp_path / "plugged").read(TIMESTAMP, 16_384)
    with serving(FolderShelf(tmp_path / "plugged")) as server:
        base = f"http://127.0.0.1:{server.port}"
        for path in paths:
            assert httpx.get(f"{base}/{path}", trust_env=False).status_code == 404
        assert httpx.get(f"{base}/{TIMESTAMP}", trust_env=False).status_code == 200


@pytest.mark.parametrize("name", ["metadata", "targets/adapters"])
def test_an_export_writes_nothing_outside_of_its_folder(
    world: World, tmp_path: Path, name: str
) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "stick"
    elsewhere.mkdir()
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(MirrorError, match="is a link"):
        export_mirror(world.folder / "repository", folder)
    assert list(elsewhere.iterdir()) == []


def test_handshakes_that_never_end_hold_no_place(world: World, stick: Path) -> None:
    limits = {"connections": 3, "header_seconds": 1.5, "stall_seconds": 1.5}
    with serving(FolderShelf(stick), world.tls, **limits) as server:
        address = ("127.0.0.1", server.port)
        silent = [socket.create_connection(address, timeout=10) for _ in range(9)]
        dropped = server.metrics.dropped
        until(lambda: dropped.labels("crowded")._value.get() >= 3, what="the crowd to go")
        until(lambda: dropped.labels("slow")._value.get() >= 3, what="the silent to go")
        for connection in silent:
            with connection:
                assert connection.recv(1) == b""
        context = httpx.create_ssl_context()
        context.load_verify_locations(cadata=world.authority.pem.decode())
        url = f"https://127.0.0.1:{server.port}/{TIMESTAMP}"
        assert httpx.get(url, verify=context, trust_env=False).status_code == 200


def test_names_that_nobody_has_leave_nothing_in_a_relay(
    world: World, stick: Path, tmp_path: Path
) -> None:
    """Whoever reaches a relay may ask it for anything; a folder for each would fill its disk."""
    cache = tmp_path / "cache"
    with serving(FolderShelf(stick)) as origin:
        shelf = RelayShelf(f"http://127.0.0.1:{origin.port}", cache, silence=2.0)
        with serving(shelf) as relay, httpx.Client(trust_env=False) as client:
            for number in range(20):
                path = f"targets/n{number}/{number:064x}.x"
                url = f"http://127.0.0.1:{relay.port}/{path}"
                assert client.get(url).status_code == 404
    assert not cache.exists()


@pytest.mark.parametrize("at_once", [HEADERS, BODY], ids=["headers", "body"])
def test_an_upstream_that_drips_does_not_keep_a_relay(tmp_path: Path, at_once: bytes) -> None:
    with Dripping(None, at_once) as rogue, within(8):
        shelf = RelayShelf(rogue.url, tmp_path / "cache", silence=0.3)
        with serving(shelf) as relay:
            url = f"http://127.0.0.1:{relay.port}/{TIMESTAMP}"
            assert httpx.get(url, trust_env=False, timeout=7).status_code == 503


def test_what_an_upstream_makes_up_does_not_fill_a_relays_disk(
    world: World, stick: Path, tmp_path: Path
) -> None:
    for number in range(30):
        (stick / "metadata" / f"{number + 100}.made-up.json").write_bytes(bytes(1000))
    with serving(FolderShelf(stick)) as origin:
        shelf = RelayShelf(
            f"http://127.0.0.1:{origin.port}", tmp_path / "cache", cache_max=5000, silence=2.0
        )
        with serving(shelf) as relay, httpx.Client(trust_env=False) as client:
            for number in range(30):
                path = f"metadata/{number + 100}.made-up.json"
                url = f"http://127.0.0.1:{relay.port}/{path}"
                assert client.get(url).status_code == 200
    assert sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.json")) <= 5000
