"""Releases from anywhere: folders, HTTPS servers, relays, and sources that cannot be trusted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from aggregation import payload
from clients import identity
from clients.connection import ConnectionLost, Denied
from clients.download import Download, Way, obtain
from clients.https import HttpsMirror
from clients.link import Backoff
from clients.mirrors import FolderMirror
from clients.partial import Partial, PayloadMismatch
from clients.sources import SourceError, Sources, open_sources, read_bundle
from clients.trust import DeviceFacts, Install, Rejected, Trust
from federation.authority import open_authority, server_tls
from federation.enrolment import Enrolment
from federation.mirror import FolderShelf, MirrorError, export_mirror
from federation.mirror_cli import mirror
from federation.published import ReleaseRecord
from federation.relay import RelayShelf
from federation.store import Store
from protos.messages import EnrolRequest
from protos.signed import Assignment, ReleaseStatement
from simulations.light_device import BASE_DIGEST, light_adapter, light_agent
from simulations.processes import hold_port
from tests.delivery.mirrors import Rogue, server_context, serving
from tests.trust.fleet_of_one import Publisher
from tests.waiting import until

NOW = datetime.now(UTC)


class World:
    """A fleet's repository with one release for everybody, and its authority; no server runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = Publisher(folder, now=NOW)
        self.repository = self.publisher.repository
        self.store = Store.open(folder / "fleet.sqlite")
        self.authority = open_authority(folder / "authority", NOW)
        server_tls(self.authority, folder / "authority", NOW, clients=False)
        self.tls = server_context(folder / "authority")
        self.enrolment = Enrolment(self.store, self.authority, self.repository.root)
        self.nobody = hold_port(0)  # an address where no server answers
        self.record = self.release(1)
        self.publisher.order(self.record, rollout="r1")

    def close(self) -> None:
        self.store.close()
        self.nobody.close()

    def release(self, counter: int) -> ReleaseRecord:
        adapter = light_adapter(counter, rank=16)
        found = payload.encode(adapter)
        statement = ReleaseStatement(
            channel="stable",
            counter=counter,
            adapter_digest=found.adapter_digest,
            spec_digest=adapter.spec.digest,
            base_digest=BASE_DIGEST,
            plain_length=found.plain_length,
            runtime=("numpy",),
        )
        metadata = self.publisher.signed_adapters(statement, found.data)
        return self.repository.publish_release(metadata, found.data, now=NOW)

    def enrol(self, home: Path) -> Path:
        key = identity.key_of(home)
        token = self.enrolment.make_token(who="test").secret
        request = EnrolRequest(token=token, certificate_request=identity.certificate_request(key))
        reply = self.enrolment.enrol(request)
        port = self.nobody.getsockname()[1]
        identity.save(home, reply, key_pem=key, fleet=f"127.0.0.1:{port}")
        return home

    @property
    def payload(self) -> bytes:
        return self.repository.read(self.record.path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.close()


@pytest.fixture
def stick(world: World, tmp_path: Path) -> Path:
    export_mirror(world.folder / "repository", tmp_path / "stick")
    return tmp_path / "stick"


def wait_for_release(home: Path, sources: Sources, name: str = "stable-1") -> Any:
    agent, runtime = light_agent(home, sources=sources, wait=0.05)
    agent.start()
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        until(lambda: runtime.pin().name == name, what=name)
    finally:
        agent.stop()
        thread.join(120)
    return runtime


# --- the copy -------------------------------------------------------------------------------------


def test_an_export_is_whole_repeatable_and_leaves_timestamp_for_last(
    world: World, tmp_path: Path
) -> None:
    repository, folder = world.folder / "repository", tmp_path / "copy"
    plan = export_mirror(repository, folder, dry_run=True)
    assert not folder.exists()
    done = export_mirror(repository, folder)
    assert (done.files, done.bytes, done.releases) == (plan.files, plan.bytes, ("stable-1",))
    assert done.copied == done.files
    assert export_mirror(repository, folder).copied == 0
    assert export_mirror(folder, tmp_path / "copy of the copy").copied == done.files
    (folder / "metadata" / "timestamp.json").write_bytes(b"half")
    (folder / world.record.path).write_bytes(b"half")
    assert export_mirror(repository, folder).copied == 2
    for path in [file for file in folder.rglob("*") if file.is_file()]:
        assert path.read_bytes() == (repository / path.relative_to(folder)).read_bytes()
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    # A clock of the file system ticks slowly: others may have been written in the same tick.
    assert times[folder / "metadata" / "timestamp.json"] == max(times.values())
    assert done.usable_until > NOW


def test_an_altered_payload_is_not_exported(world: World, stick: Path, tmp_path: Path) -> None:
    (stick / world.record.path).write_bytes(b"something else")
    with pytest.raises(MirrorError, match="not what its name says"):
        export_mirror(stick, tmp_path / "copy")
    with pytest.raises(MirrorError, match="choose a folder outside"):
        export_mirror(stick, stick / "inside")


def test_only_what_the_round_hands_out_can_be_exported(tmp_path: Path) -> None:
    world = World(tmp_path / "fleet")
    newer = world.release(2)
    both = export_mirror(world.folder / "repository", tmp_path / "both")
    one = export_mirror(world.folder / "repository", tmp_path / "one", only_assigned=True)
    assert (both.releases, one.releases) == (("stable-1", "stable-2"), ("stable-1",))
    assert not (tmp_path / "one" / newer.path).exists()
    world.close()


def test_the_command_exports_and_says_until_when(world: World, tmp_path: Path) -> None:
    words = ["export", str(tmp_path / "x"), "--repository", str(world.folder / "repository")]
    done = CliRunner().invoke(mirror, [*words, "--format", "json"])
    data = json.loads(done.stdout)["data"]
    assert data["releases"] == ["stable-1"]
    assert data["copied"] == data["files"] > 5
    assert "export again before" in CliRunner().invoke(mirror, words).stdout
    missing = CliRunner().invoke(mirror, ["export", str(tmp_path / "y"), "--home", str(tmp_path)])
    assert missing.exit_code == 2
    assert "there is no repository" in missing.stderr
    for bad, word in (
        (["serve", str(tmp_path / "none")], "holds no repository"),
        (["serve", "--upstream", "https://x"], "needs a FOLDER"),
        (["serve", str(tmp_path), "--upstream", "ftp://x"], "give https://"),
        (["serve", str(tmp_path / "x"), "--key", "k"], "belong together"),
        (["serve", str(tmp_path / "x"), "--key", "k", "--certificate", "c"], "cannot use"),
    ):
        refused = CliRunner().invoke(mirror, bad)
        assert refused.exit_code == 2
        assert word in refused.stderr


# --- the server -----------------------------------------------------------------------------------


def test_range_conditions_and_paths_over_https(world: World, stick: Path) -> None:
    pem = world.authority.pem
    with serving(FolderShelf(stick), world.tls) as server:
        context = httpx.create_ssl_context()
        context.load_verify_locations(cadata=pem.decode())
        base, path, data = f"https://127.0.0.1:{server.port}", world.record.path, world.payload
        with httpx.Client(base_url=base, verify=context, trust_env=False, timeout=120) as client:
            whole = client.get(f"/{path}")
            assert whole.content == data
            assert "immutable" in whole.headers["cache-control"]
            assert client.get("/metadata/timestamp.json").headers["cache-control"] == "no-cache"
            for given, part in (
                ("bytes=0-0", data[:1]),
                ("bytes=1000-", data[1000:]),
                ("bytes=-7", data[-7:]),
                (f"bytes=5-{len(data) + 50}", data[5:]),
            ):
                some = client.get(f"/{path}", headers={"Range": given})
                assert (some.status_code, some.content) == (206, part)
            again = client.get(f"/{path}", headers={"If-None-Match": whole.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            other = client.get(f"/{path}", headers={"Range": "bytes=5-", "If-Range": '"x"'})
            assert (other.status_code, other.content) == (200, data)
            beyond = client.get(f"/{path}", headers={"Range": f"bytes={len(data)}-"})
            assert (beyond.status_code, beyond.headers["content-range"]) == (
                416,
                f"bytes */{len(data)}",
            )
            head = client.head(f"/{path}")
            assert (head.headers["content-length"], head.content) == (str(len(data)), b"")
            for wrong in ("/", "/metadata", "/../fleet.sqlite", "/metadata/%2e%2e/x.json", "/x"):
                assert client.get(wrong).status_code == 404
            assert client.post(f"/{path}", content=b"x").status_code in (405, 413)
            assert 'airpeft_mirror_requests_total{status="206"} 4.0' in client.get("/metrics").text


def test_slow_writers_and_readers_lose_their_place(world: World, stick: Path) -> None:
    big = stick / world.record.path
    big.write_bytes(os.urandom(16 * 1024 * 1024))  # more than socket buffers hold
    with serving(FolderShelf(stick), header_seconds=0.3, stall_seconds=0.3) as server:
        address = ("127.0.0.1", server.port)
        dropped = server.metrics.dropped.labels("slow")._value
        with (
            socket.create_connection(address, timeout=120) as writer,
            socket.create_connection(address, timeout=120) as reader,
        ):
            # It may be over before a word is said: then the peer has gone.
            with contextlib.suppress(ConnectionError):
                reader.sendall(f"GET /{world.record.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            with contextlib.suppress(ConnectionError):
                writer.sendall(b"GET /metadata/timest")
                assert writer.recv(1) == b"", "closed without an answer"
            until(lambda: dropped.get() == 2, what="both to be dropped")


def test_the_crowd_and_the_giant_are_turned_away(world: World, stick: Path) -> None:
    patient = {"header_seconds": 600.0, "stall_seconds": 600.0}
    with serving(FolderShelf(stick), connections=2, **patient) as server:
        address = ("127.0.0.1", server.port)
        with (
            socket.create_connection(address),
            socket.create_connection(address),
            socket.create_connection(address, timeout=120) as third,
        ):
            assert third.recv(100).startswith(b"HTTP/1.1 503")
        until(lambda: server.metrics.open._value.get() == 0, what="free places")
        with socket.create_connection(address, timeout=120) as giant:
            with contextlib.suppress(ConnectionError):  # the answer comes before the end of it
                giant.sendall(b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000)
            assert giant.recv(100).startswith(b"HTTP/1.1 431")


# --- the relay ------------------------------------------------------------------------------------


def test_a_relay_asks_once_keeps_what_is_named_and_survives_its_upstream(
    world: World, stick: Path, tmp_path: Path
) -> None:
    now = [1000.0]
    with serving(FolderShelf(stick)) as origin:
        shelf = RelayShelf(
            f"http://127.0.0.1:{origin.port}", tmp_path / "cache", clock=lambda: now[0]
        )
        with serving(shelf) as relay:
            base, path = f"http://127.0.0.1:{relay.port}", world.record.path
            with httpx.Client(base_url=base, trust_env=False, timeout=120) as client:
                got: list[bytes] = []
                threads = [
                    threading.Thread(
                        target=lambda: got.append(
                            httpx.get(f"{base}/{path}", trust_env=False, timeout=120).content
                        )
                    )
                    for _ in range(6)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(120)
                assert got == [world.payload] * 6
                assert origin.metrics.requests.labels("200")._value.get() == 1
                first = client.get("/metadata/timestamp.json").content
                assert client.get("/metadata/99.root.json").status_code == 404
                assert client.get("/metadata/99.root.json").status_code == 404
                assert origin.metrics.requests.labels("404")._value.get() == 1
                (stick / "metadata" / "timestamp.json").write_bytes(b"newer")
                assert client.get("/metadata/timestamp.json").content == first
                now[0] += 60
                assert client.get("/metadata/timestamp.json").content == b"newer"
                liar = stick / path.replace(world.record.sha256, "0" * 64)
                liar.write_bytes(b"not that")
                wrong = client.get(f"/{liar.relative_to(stick)}")
                assert wrong.status_code == 503
                origin_port = origin.port
                assert origin_port
                (stick / "metadata" / "timestamp.json").unlink()
                now[0] += 60
    # upstream is gone
    with (
        hold_port(origin_port),
        serving(RelayShelf(f"http://127.0.0.1:{origin_port}", tmp_path / "cache")) as relay,
    ):
        base = f"http://127.0.0.1:{relay.port}"
        assert httpx.get(f"{base}/{path}", trust_env=False, timeout=120).content == world.payload
        stale = httpx.get(f"{base}/metadata/timestamp.json", trust_env=False, timeout=120)
        assert stale.content == b"newer"
        assert (
            httpx.get(f"{base}/metadata/1.root.json", trust_env=False, timeout=120).status_code
            == 503
        )


def test_a_relay_goes_on_at_the_byte_and_drops_the_longest_unused(
    world: World, stick: Path, tmp_path: Path
) -> None:
    with Rogue(stick, world.tls, "cut", after=60_000) as rogue:
        context = httpx.create_ssl_context()
        context.load_verify_locations(cadata=world.authority.pem.decode())
        shelf = RelayShelf(rogue.url, tmp_path / "cache", tls=context, cache_max=10)
        with serving(shelf) as relay:
            url = f"http://127.0.0.1:{relay.port}/{world.record.path}"
            answers = [httpx.get(url, trust_env=False, timeout=120) for _ in range(4)]
        assert answers[-1].content == world.payload
        ranges = [wanted for path, wanted in rogue.asked if path == world.record.path]
        assert "bytes=60000-" in ranges
    assert (tmp_path / "cache" / world.record.path).exists(), "the newest stays whatever its size"


# --- a device and its sources ---------------------------------------------------------------------


def test_a_release_installs_offline_from_a_folder(
    world: World, stick: Path, tmp_path: Path
) -> None:
    home = world.enrol(tmp_path / "device")
    wait_for_release(home, open_sources([str(stick)], seconds=0.05))
    events = [file.name.split("-")[1] for file in sorted((home / "telemetry").glob("*.report"))]
    assert [event.removesuffix(".report") for event in events] == [
        "started",
        "downloaded",
        "staged",
        "committed",
    ], "kept until the fleet is reached"


def test_a_stick_is_taken_up_when_the_fleet_is_away(
    world: World, stick: Path, tmp_path: Path
) -> None:
    late = tmp_path / "late"
    sources = open_sources(["fleet", str(late)], seconds=0.05)
    home = world.enrol(tmp_path / "device")
    timer = threading.Timer(0.5, lambda: stick.rename(late))  # plugged in while it runs
    timer.start()
    wait_for_release(home, sources)
    timer.join()


@pytest.mark.parametrize(
    "way", ["lie", "cut", "stall", "drip", "short", "long", "error", "redirect", "elsewhere"]
)
def test_a_bad_https_source_costs_time_and_not_the_release(
    world: World, stick: Path, tmp_path: Path, way: str
) -> None:
    half = tmp_path / "half"
    with Rogue(stick, world.tls, way) as rogue:
        slow = way in ("stall", "drip")  # what another way of being bad takes is no matter
        silence, grace = (0.4, 0.2) if slow else (120.0, 120.0)
        bad = HttpsMirror(rogue.url, authorities=[world.authority.pem], silence=silence)
        partial = Partial(half, world.record.sha256, world.record.length)
        told: list[tuple[str, str]] = []
        download = Download(
            [Way("bad", bad.fetch), Way("stick", FolderMirror(stick).fetch)],
            world.record.path,
            world.record.length,
            grace=grace,
            count=lambda source, result: told.append((source, result)),
        )
        stop, backoff = threading.Event(), Backoff(random.SystemRandom(), base=0.01)
        data = obtain(partial, download, backoff=backoff, stop=stop, tries=3)
        assert data == world.payload
        bad.close()
    results = [result for source, result in told if source == "bad"]
    expected = {
        "lie": "lied",
        "long": "lied",
        "short": "short",
        "error": "cut",
        "redirect": "denied",
        "elsewhere": "complete",
    }
    assert expected.get(way, "cut") in results


def test_a_second_source_goes_on_at_the_byte_where_the_first_stopped(
    world: World, stick: Path, tmp_path: Path
) -> None:
    with Rogue(stick, world.tls, "cut", 5000) as first, Rogue(stick, world.tls, "honest") as second:
        pem = world.authority.pem
        ways = [
            Way(rogue.url, HttpsMirror(rogue.url, authorities=[pem]).fetch)
            for rogue in (first, second)
        ]
        partial = Partial(tmp_path / "p", world.record.sha256, world.record.length)
        download = Download(ways, world.record.path, world.record.length)
        stop, backoff = threading.Event(), Backoff(random.SystemRandom(), base=0.01)
        data = obtain(partial, download, backoff=backoff, stop=stop, tries=3)
        assert data == world.payload
        assert [wanted for _, wanted in first.asked] == [""]
        assert [wanted for _, wanted in second.asked] == ["bytes=5000-"]


def test_among_several_that_had_a_part_the_liar_is_found(tmp_path: Path) -> None:
    good = bytes(range(256)) * 40
    digest = hashlib.sha256(good).hexdigest()

    def liar(path: str, offset: int) -> Iterator[bytes]:
        yield b"x" * 1000
        raise ConnectionLost("cut")

    def honest(path: str, offset: int) -> Iterator[bytes]:
        yield good[offset:]

    told: list[tuple[str, str]] = []
    download = Download(
        [Way("liar", liar), Way("honest", honest)],
        "p",
        len(good),
        count=lambda source, result: told.append((source, result)),
    )
    stop, backoff = threading.Event(), Backoff(random.SystemRandom(), base=0.01)
    partial = Partial(tmp_path / "p", digest, len(good))
    assert obtain(partial, download, backoff=backoff, stop=stop, tries=2) == good
    only = Download([Way("liar", lambda p, o: iter([bytes(len(good))]))], "p", len(good))
    partial = Partial(tmp_path / "q", digest, len(good))
    partial.append(b"left by an earlier try")
    with pytest.raises(PayloadMismatch):
        obtain(partial, only, backoff=backoff, stop=stop, tries=2)
    nobody = Download([], "p", len(good))
    with pytest.raises(ConnectionLost, match="no source"):
        list(nobody(0))


def test_a_server_that_ignores_range_is_read_from_the_offset(world: World, stick: Path) -> None:
    with Rogue(stick, world.tls, "whole") as rogue:
        source = HttpsMirror(rogue.url, authorities=[world.authority.pem])
        assert b"".join(source.fetch(world.record.path, 777)) == world.payload[777:]
        with pytest.raises(Denied):
            source.read("metadata/77.root.json", 100)
        with pytest.raises(ConnectionLost, match="longer than 10"):
            source.read("metadata/timestamp.json", 10)
        source.close()
        stranger = HttpsMirror(rogue.url)
        with pytest.raises(ConnectionLost, match=r"(?i)certificate"):
            stranger.read("metadata/timestamp.json", 1000)
        stranger.close()


def test_a_source_brings_the_same_verdicts_as_the_fleet(
    world: World, stick: Path, tmp_path: Path
) -> None:
    facts = DeviceFacts(device_id="d", base_digest=BASE_DIGEST, runtime="numpy")
    trust = Trust(tmp_path / "trust", world.repository.root())
    source = FolderMirror(stick)
    bundle = read_bundle(source, 0)
    assert bundle.files == world.repository.bundle(0).files
    assert isinstance(trust.accept(bundle, device=facts, now=NOW), Install)
    forged = stick / "metadata" / "timestamp.json"
    forged.write_bytes(forged.read_bytes().replace(b'"sig":"', b'"sig":"00'))
    with pytest.raises(Rejected):
        trust.accept(read_bundle(source, 0), device=facts, now=NOW)
    seen = Sources([str(stick)], {str(stick): source}, seconds=10, clock=lambda: 0.0)
    assert len(list(seen.visit(1, 0))) == 1
    assert list(seen.visit(1, 0)) == [], "not due"
    lagging = Sources([str(stick)], {str(stick): source}, clock=lambda: 0.0)
    assert list(lagging.visit(1, 10**6)) == []
    forged.write_bytes(b"{}")
    broken = Sources([str(stick)], {str(stick): source}, clock=lambda: 0.0)
    assert list(broken.visit(1, 0)) == []


def test_what_lies_on_a_stick_cannot_hold_or_lead_a_device_elsewhere(stick: Path) -> None:
    os.mkfifo(stick / "metadata" / "9.root.json")
    source = FolderMirror(stick)
    with pytest.raises(Denied, match="ordinary"):
        source.read("metadata/9.root.json", 100)
    for path in ("../../etc/passwd", "/etc/passwd", "metadata/../x", ""):
        with pytest.raises(Denied):
            source.read(path, 100)


def test_settings_that_name_no_source_are_refused() -> None:
    assert open_sources(["fleet"]).has_fleet
    for bad in (
        [],
        ["fleet", "fleet"],
        ["stick"],
        ["http://mirror.example.org"],
        ["https://"],
        ["https://u@h/"],
        ["https://h:x"],
        ["ftp://h"],
    ):
        with pytest.raises(SourceError):
            open_sources(bad)
    with pytest.raises(SourceError, match="PEM"):
        open_sources(["https://h"], authorities=[b"nonsense"])
    assert open_sources(["http://127.0.0.1:1", "http://localhost:1"]).has_fleet is False
    assert Assignment(0).is_base
