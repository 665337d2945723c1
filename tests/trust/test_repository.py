"""What the server's side takes in and hands out."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from aggregation.durable import StorageError
from federation import roles
from federation.keys import generate
from federation.repository import NotFoundError, PublishError, Repository, RepositoryError
from federation.verification import verify_repository
from protos.signed import Assignment, RoundDocument
from tests.trust.fleet_of_one import START, Device, Publisher, payload_of, statement


def test_a_server_without_offline_keys_goes_on(publisher: Publisher, device: Device) -> None:
    record = publisher.release(1)
    again = Repository(publisher.repository.folder, publisher.online)
    assert again.releases() == (record,)
    again.publish_round(
        RoundDocument(
            sequence=1,
            rollout="r",
            salt="",
            assignments=(Assignment(10_000, record.target, record.sha256),),
        ),
        now=START,
    )
    assert device.installs(again.bundle()).name == "stable-1"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one signature", "1/2"),
        ("online signature", "0/2"),
        ("other payload", "was signed for"),
        ("old version", "make it again"),
        ("counter used before", "never reused"),
        ("changed release", "cannot be changed"),
        ("nothing new", "exactly one new"),
        ("dropped from the round", "must stay listed"),
        ("expired", "expired"),
        ("other metadata", "not an adapters file"),
        ("junk", "not signed metadata"),
    ],
)
def test_releases_that_are_refused(publisher: Publisher, what: str, message: str) -> None:
    one = publisher.release(2)
    publisher.order(one)
    before = publisher.bundle()
    data, now, payload = payload_of(3), START, payload_of(3)
    new, signers, keep = statement(3), publisher.adapter_keys[:2], True
    if what == "one signature":
        signers = publisher.adapter_keys[:1]
    elif what == "online signature":
        signers = [publisher.online]
    elif what == "other payload":
        payload = b"evil"
    elif what == "counter used before":
        new = statement(1)
    elif what == "changed release":
        new = statement(2, notes="other words")
    elif what == "dropped from the round":
        keep = False
    elif what == "expired":
        now = START + timedelta(days=200)
    signed = publisher.signed_adapters(new, data, signers=signers, keep=keep)
    if what == "old version":
        publisher.release(3)
        signed = publisher.signed_adapters(statement(4), data)
        publisher.release(4)
        before = publisher.bundle()
    elif what == "nothing new":
        current = Metadata[Any].from_bytes(publisher.repository.adapters())
        current.signed.version += 1
        current.signatures.clear()
        signed = roles.to_bytes(roles.sign(current, signers))
    elif what == "other metadata":
        signed = publisher.repository.root()
    elif what == "junk":
        signed = b"[" * 10_000
    with pytest.raises(PublishError, match=message):
        publisher.repository.publish_release(signed, payload, now=now)
    assert publisher.bundle() == before


@pytest.mark.parametrize(
    ("sequence", "target", "sha256", "message"),
    [
        (1, "adapters/stable/1.airpeft", "a" * 64, "not above"),
        (2, "adapters/stable/1.airpeft", "a" * 64, "have not signed"),
        (2, "adapters/stable/9.airpeft", "a" * 64, "have not signed"),
    ],
)
def test_rounds_that_are_refused(
    publisher: Publisher, sequence: int, target: str, sha256: str, message: str
) -> None:
    publisher.order(publisher.release(1))
    document = RoundDocument(
        sequence=sequence,
        rollout="",
        salt="other",
        assignments=(Assignment(1, target, sha256),),
    )
    with pytest.raises(PublishError, match=message):
        publisher.repository.publish_round(document, now=START)


def test_doing_it_again_changes_nothing(publisher: Publisher) -> None:
    data = payload_of(1)
    signed = publisher.signed_adapters(statement(1), data)
    record = publisher.repository.publish_release(signed, data, now=START)
    document = publisher.order(record)
    before = publisher.bundle()
    assert publisher.repository.publish_release(signed, data, now=START) == record
    assert publisher.repository.publish_round(document, now=START) == document
    assert publisher.bundle() == before


def test_a_full_disk_changes_nothing(publisher: Publisher) -> None:
    publisher.order(publisher.release(1))
    before = publisher.bundle()
    (publisher.repository.folder / "metadata" / "timestamp.json.partial").mkdir()
    with pytest.raises(StorageError):
        publisher.refresh()
    with pytest.raises(StorageError):
        publisher.release(2)
    assert publisher.bundle() == before
    (publisher.repository.folder / "metadata" / "timestamp.json.partial").rmdir()
    assert publisher.release(2).name == "stable-2"


def test_a_fleet_that_is_left_alone_for_months_stays_believable(
    publisher: Publisher, device: Device
) -> None:
    publisher.order(publisher.release(1))
    for _ in range(15):
        publisher.later(days=10)
        publisher.refresh()
        assert device.installs().name == "stable-1"
    soonest = publisher.repository.expiries()
    assert {row.role for row in soonest if row.expires < publisher.now + timedelta(days=90)} >= {
        "timestamp",
        "adapters",
        "targets",
    }


def test_superseded_files_are_removed_and_roots_never(publisher: Publisher) -> None:
    record = publisher.release(1)
    for salt in range(30):
        publisher.order(record, salt=str(salt))
    names = {path.name for path in (publisher.repository.folder / "metadata").iterdir()}
    assert "1.root.json" in names
    assert len([name for name in names if name.endswith(".rounds.json")]) <= 17
    assert Repository(publisher.repository.folder).round().salt == "29"


def test_reading_stays_inside(publisher: Publisher) -> None:
    record, repository = publisher.release(1), publisher.repository
    assert repository.read(record.path, 5, 4) == payload_of(1)[5:9]
    assert repository.read("metadata/timestamp.json") == publisher.bundle().files["timestamp.json"]
    (repository.folder / "targets" / "secret").write_text("x")
    for path in (
        "",
        "metadata/../../keys/online.pem",
        "/etc/passwd",
        "targets/secret",
        "targets/../metadata/timestamp.json",
        "metadata/timestamp.json.partial",
        "targets/" + "a" * 10_000,
        record.path + "\0",
        record.path.upper(),
    ):
        with pytest.raises(NotFoundError):
            repository.read(path)
    for offset in (-1, record.length + 1):
        with pytest.raises(NotFoundError):
            repository.read(record.path, offset)


def test_another_online_key_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    stranger = generate(tmp_path / "other", ["online"]).signer("online")
    with pytest.raises(RepositoryError, match="not the one"):
        Repository(publisher.repository.folder, stranger)
    reader = Repository(publisher.repository.folder)
    with pytest.raises(RepositoryError, match="for reading"):
        reader.refresh_timestamp(START)


def test_founding_asks_for_separate_keys(publisher: Publisher, tmp_path: Path) -> None:
    def create(root: Any, adapters: Any, online: Any) -> None:
        Repository.create(
            tmp_path / "new", root_keys=root, adapter_keys=adapters, online=online, now=START
        )

    p = publisher
    with pytest.raises(RepositoryError, match="threshold"):
        create(p.root_keys[:1], p.adapter_keys, p.online)
    with pytest.raises(RepositoryError, match="different"):
        create(p.root_keys, p.root_keys, p.online)
    with pytest.raises(RepositoryError, match="different"):
        create(p.root_keys, p.adapter_keys, p.root_keys[0])
    with pytest.raises(ValueError, match="zone"):
        p.repository.refresh_timestamp(datetime(2026, 1, 1))
    with pytest.raises(RepositoryError, match="never overwritten"):
        Repository.create(
            p.repository.folder,
            root_keys=p.root_keys,
            adapter_keys=p.adapter_keys,
            online=p.online,
            now=START,
        )


@pytest.mark.parametrize("name", ["timestamp.json", "1.root.json", "2.adapters.json"])
def test_a_damaged_repository_says_which_file(publisher: Publisher, name: str) -> None:
    publisher.release(1)
    path = publisher.repository.folder / "metadata" / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version":', b'"version":1', 1))
    with pytest.raises(RepositoryError, match=name):
        Repository(publisher.repository.folder)
    path.unlink()
    with pytest.raises(RepositoryError):
        Repository(publisher.repository.folder)


def test_several_threads_never_mix(publisher: Publisher, device: Device) -> None:
    record = publisher.release(1)
    errors: list[BaseException] = []

    def work(salt: str) -> None:
        try:
            for _ in range(5):
                publisher.repository.refresh_timestamp(START)
                publisher.repository.bundle()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    publisher.order(record)
    for thread in threads:
        thread.join()
    assert not errors
    assert device.installs().name == "stable-1"
    assert publisher.repository.versions()["timestamp"] == 23


def test_verify_needs_only_the_root_and_the_files(publisher: Publisher, tmp_path: Path) -> None:
    publisher.order(publisher.release(1))
    folder, root = publisher.repository.folder, publisher.repository.root()
    report = verify_repository(folder, root, now=START)
    assert report.sound
    by_role = {seal.role: seal for seal in report.roles}
    assert by_role["adapters"].signed_by == ("adapters-1", "adapters-2")
    assert by_role["adapters"].made == START
    assert by_role["rounds"].signed_by == ("online",)
    assert [release.payload for release in report.releases] == ["good"]
    payload = folder / report.releases[0].record.path
    payload.write_bytes(payload.read_bytes()[::-1])
    wrong = verify_repository(folder, root, now=START)
    assert (wrong.sound, wrong.releases[0].payload) == (False, "wrong")
    payload.unlink()
    assert verify_repository(folder, root, now=START).releases[0].payload == "missing"
    assert not verify_repository(folder, root, now=START + timedelta(days=2)).sound
    with pytest.raises(RepositoryError, match="descend"):
        verify_repository(folder, Publisher(tmp_path / "other").repository.root(), now=START)
