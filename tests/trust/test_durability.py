"""Killed at every fsync and rename, with unsynced bytes lost: old or new, never mixed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from clients.mirrors import FolderMirror
from clients.sources import read_bundle
from clients.trust import Install, Rejected, Trust
from clients.trust_state import TrustState, read_state
from federation.mirror import export_mirror
from federation.repository import Repository, RepositoryError
from federation.verification import verify_repository
from protos.messages import MetadataBundle, RejectReason
from protos.signed import Assignment, RoundDocument
from tests.trust.fleet_of_one import Device, Publisher, payload_of, statement
from tests.trust.power_cut import every_step


def copies(original: Path, scratch: Path) -> Callable[[], Path]:
    numbers = count()

    def fresh() -> Path:
        return shutil.copytree(original, scratch / str(next(numbers)))

    return fresh


def round_two(publisher: Publisher) -> RoundDocument:
    record = publisher.repository.release("stable-1")
    return RoundDocument(
        sequence=2,
        rollout="r2",
        salt="s",
        assignments=(Assignment(1, record.target, record.sha256),),
    )


@pytest.fixture
def served(publisher: Publisher) -> Path:
    publisher.order(publisher.release(1))
    return publisher.repository.folder


def check_whole(folder: Path, publisher: Publisher) -> Repository:
    """The repository opens, verifies, offers every payload that it lists, and takes new work."""
    repository = Repository(folder, publisher.online)
    for record in repository.releases():
        assert repository.read(record.path) == payload_of(record.statement.counter)
    return repository


def test_publishing_a_release(
    publisher: Publisher, served: Path, tmp_path: Path, device: Device
) -> None:
    signed, data = publisher.signed_adapters(statement(2), payload_of(2)), payload_of(2)
    seen = set()
    for where, folder in every_step(
        copies(served, tmp_path / "cuts"),
        lambda folder: (
            lambda: Repository(folder, publisher.online).publish_release(
                signed, data, now=publisher.now
            )
        ),
    ):
        repository = check_whole(folder, publisher)
        names = tuple(record.name for record in repository.releases())
        assert names in {("stable-1",), ("stable-1", "stable-2")}, where
        seen.add(names)
        # A device that sees this state, and the repeated command, both go on.
        fresh = Device(folder / "device", publisher)
        assert fresh.installs(repository.bundle()).name == "stable-1", where
        repository.publish_release(signed, data, now=publisher.now)
        assert check_whole(folder, publisher).release("stable-2").length == len(data), where
        assert fresh.installs(repository.bundle()).name == "stable-1", where
    assert len(seen) == 2


def test_publishing_a_round(publisher: Publisher, served: Path, tmp_path: Path) -> None:
    document = round_two(publisher)
    seen = set()
    for where, folder in every_step(
        copies(served, tmp_path / "cuts"),
        lambda folder: (
            lambda: Repository(folder, publisher.online).publish_round(document, now=publisher.now)
        ),
    ):
        repository = check_whole(folder, publisher)
        assert repository.round().sequence in {1, 2}, where
        seen.add(repository.round().sequence)
        device = Device(folder / "device", publisher)
        device.accept(repository.bundle())
        repository.publish_round(document, now=publisher.now)
        device.accept(repository.bundle())
        assert device.trust.state.sequence == 2, where
    assert seen == {1, 2}


def test_dating_the_timestamp_anew(publisher: Publisher, served: Path, tmp_path: Path) -> None:
    for where, folder in every_step(
        copies(served, tmp_path / "cuts"),
        lambda folder: (
            lambda: Repository(folder, publisher.online).refresh_timestamp(publisher.now)
        ),
    ):
        repository = check_whole(folder, publisher)
        before = repository.versions()["timestamp"]
        repository.refresh_timestamp(publisher.now)
        assert repository.versions()["timestamp"] == before + 1, where


def test_founding_a_repository(publisher: Publisher, tmp_path: Path) -> None:
    numbers = count()

    def prepare() -> Path:
        folder = tmp_path / "founded" / str(next(numbers))
        folder.mkdir(parents=True)
        return folder

    def create(folder: Path) -> Repository:
        return Repository.create(
            folder / "repository",
            root_keys=publisher.root_keys,
            adapter_keys=publisher.adapter_keys,
            online=publisher.online,
            now=publisher.now,
        )

    for where, folder in every_step(prepare, lambda folder: lambda: create(folder)):
        try:
            repository = Repository(folder / "repository", publisher.online)
        except RepositoryError:
            repository = create(folder)
        assert repository.round().sequence == 0, where


def test_what_a_device_has_seen(
    publisher: Publisher, served: Path, tmp_path: Path, device: Device
) -> None:
    old = publisher.bundle()
    device.installs(old)
    publisher.order(publisher.release(2, floor=2))
    new = publisher.bundle()
    before = read_state(device.folder)
    learnt: list[TrustState] = []
    for where, folder in every_step(
        copies(device.folder, tmp_path / "cuts"),
        lambda folder: (
            lambda: Trust.open(folder).accept(new, device=device.facts, now=publisher.now)
        ),
    ):
        state = read_state(folder)
        assert state.version("timestamp") >= before.version("timestamp"), where
        assert state.sequence >= before.sequence, where
        assert (state == before) or state.floors == {"stable": 2}, where
        if state != before and state not in learnt:
            learnt.append(state)
        trust = Trust.open(folder)
        assert isinstance(trust.accept(new, device=device.facts, now=publisher.now), Install)
        with pytest.raises(Rejected) as caught:
            Trust.open(folder).accept(old, device=device.facts, now=publisher.now)
        assert caught.value.reason is RejectReason.METADATA_ROLLBACK, where
    assert len(learnt) == 1  # killed late enough, all of it was learnt; else nothing


def test_what_a_device_has_tried(
    publisher: Publisher, served: Path, tmp_path: Path, device: Device
) -> None:
    release = device.installs()
    for where, folder in every_step(
        copies(device.folder, tmp_path / "cuts"),
        lambda folder: lambda: Trust.open(folder).remember_bad(release),
    ):
        assert read_state(folder).bad in {(), (release.sha256,)}, where
        assert read_state(folder).sequence == 1, where


def test_an_enrolled_root(publisher: Publisher, tmp_path: Path) -> None:
    numbers = count()

    def prepare() -> Path:
        folder = tmp_path / "enrolled" / str(next(numbers))
        folder.mkdir(parents=True)
        return folder

    root = publisher.repository.root()
    for where, folder in every_step(
        prepare, lambda folder: lambda: Trust.bootstrap(folder / "trust", root)
    ):
        trust = Trust.bootstrap(folder / "trust", root)
        assert trust.accept(
            MetadataBundle(publisher.bundle().files),
            device=Device(folder / "other", publisher).facts,
            now=publisher.now,
        ), where


def test_bringing_a_mirror_up_to_date(publisher: Publisher, served: Path, tmp_path: Path) -> None:
    """Cut at any moment, a stick says what it said before or what is new, and has all of it."""
    old = tmp_path / "stick"
    export_mirror(served, old)
    publisher.order(publisher.release(2))
    seen = set()
    for where, folder in every_step(
        copies(old, tmp_path / "cuts"),
        lambda folder: lambda: export_mirror(publisher.repository.folder, folder),
    ):
        bundle = read_bundle(FolderMirror(folder), 0)
        release = Device(folder / "device", publisher).installs(bundle)
        data = (folder / release.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == release.sha256, where
        seen.add(release.name)
        export_mirror(publisher.repository.folder, folder)
        again = verify_repository(folder, publisher.repository.root(), now=publisher.now)
        assert (again.sound, len(again.releases)) == (True, 2), where
    assert seen == {"stable-1", "stable-2"}
