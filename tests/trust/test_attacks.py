"""The threats that speak of metadata, one test each: the attack is mounted, and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, TargetFile

from aggregation.durable import StorageError
from clients.trust import Rejected, Stay, Trust, TrustStateError, Withdraw
from clients.trust_source import MAX_FILE_BYTES, MAX_TIMESTAMP_BYTES
from clients.trust_state import MAX_CHANGES
from federation import roles
from federation.keys import generate
from protos.messages import MetadataBundle, RejectReason, bucket
from protos.signed import SIGNED_UNIX, Assignment
from tests.trust.fleet_of_one import (
    OTHER_BASE,
    START,
    Device,
    Publisher,
    file_of,
    payload_of,
    rebuilt,
    statement,
    with_files,
)

R = RejectReason


@pytest.fixture
def first(publisher: Publisher, device: Device) -> Device:
    """A device that runs stable-1."""
    publisher.order(publisher.release(1))
    assert device.installs().name == "stable-1"
    return device


# What must work


def test_a_signed_release_in_a_signed_round_is_installed(
    publisher: Publisher, device: Device
) -> None:
    record = publisher.release(1)
    publisher.order(record, rollout="r-7")
    release = device.installs()
    assert (release.name, release.counter, release.channel) == ("stable-1", 1, "stable")
    assert (release.sha256, release.length) == (record.sha256, len(payload_of(1)))
    assert (release.rollout, release.sequence) == ("r-7", 1)
    assert publisher.repository.read(release.path) == payload_of(1)
    assert device.installs() == release  # the same bundle, the same answer


def test_before_the_first_round_a_device_stays(device: Device) -> None:
    assert isinstance(device.accept(), Stay)


def test_a_wave_reaches_the_buckets_below_it_and_only_grows(
    publisher: Publisher, tmp_path: Path
) -> None:
    record = publisher.release(1)
    devices = [Device(tmp_path / f"d{i}", publisher, device_id=f"d-{i}") for i in range(8)]
    reached: set[str] = set()
    for basis_points in (0, 2_500, 5_000, 10_000):
        publisher.order(Assignment(basis_points, record.target, record.sha256), salt="spring")
        now = {d.facts.device_id for d in devices if not isinstance(d.accept(), Stay)}
        assert now == {
            d.facts.device_id for d in devices if bucket("spring", d.facts.device_id) < basis_points
        }
        assert reached <= now
        reached = now
    assert len(reached) == 8


def test_operator_rollback_is_a_new_round_with_the_older_release(
    publisher: Publisher, device: Device
) -> None:
    one, two = publisher.release(1), publisher.release(2)
    publisher.order(two)
    assert device.installs().name == "stable-2"
    publisher.order(one)
    assert device.installs().name == "stable-1"


def test_a_round_can_send_devices_back_to_the_base_model(
    publisher: Publisher, first: Device
) -> None:
    publisher.order(Assignment(10_000))
    assert isinstance(first.accept(), Withdraw)


def test_thresholds_are_met_by_any_two_of_three_keys(publisher: Publisher, device: Device) -> None:
    data = payload_of(1)
    signed = publisher.signed_adapters(statement(1), data, signers=publisher.adapter_keys[1:])
    publisher.order(publisher.repository.publish_release(signed, data, now=publisher.now))
    assert device.installs().name == "stable-1"


# Old and mixed metadata


def test_replay_to_a_device_that_has_seen_newer(publisher: Publisher, first: Device) -> None:
    old = publisher.bundle()
    publisher.order(publisher.release(2))
    assert first.installs().name == "stable-2"
    refused = first.refuses(old)
    assert refused.reason is R.METADATA_ROLLBACK
    assert "timestamp" in refused.detail, "known by its number alone, before anything in it counts"


def test_replay_after_the_cached_roots_are_wiped(publisher: Publisher, first: Device) -> None:
    old = publisher.bundle()
    publisher.order(publisher.release(2))
    first.installs()
    shutil.rmtree(first.folder / "roots", ignore_errors=True)
    first.restart()
    assert first.reason(old) is R.METADATA_ROLLBACK


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_damaged_marks_are_an_error_and_not_a_new_device(first: Device, damage: str) -> None:
    path = first.folder / "trust.json"
    data = path.read_bytes()
    if damage == "flipped":
        at = data.index(b'"root": ') + 8
        path.write_bytes(data[:at] + b"9" + data[at + 1 :])
    else:
        path.write_bytes(data[:40] if damage == "truncated" else b"")
    with pytest.raises(TrustStateError, match="enrol"):
        first.restart()


@pytest.mark.parametrize("role", ["snapshot", "adapters", "rounds"])
def test_mix_and_match_of_an_old_file_under_its_new_name(
    publisher: Publisher, first: Device, role: str
) -> None:
    old = publisher.bundle()
    publisher.order(publisher.release(2))
    new = publisher.bundle()
    mixed = with_files(new, {file_of(new, role): old.files[file_of(old, role)]})
    assert first.reason(mixed) is R.METADATA_MALFORMED
    assert first.installs(new).name == "stable-2"  # the honest bundle still works


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "adapters", "rounds"])
def test_a_missing_file(publisher: Publisher, first: Device, role: str) -> None:
    publisher.order(publisher.release(2))
    new = publisher.bundle()
    assert first.reason(with_files(new, {file_of(new, role): None})) is R.METADATA_MALFORMED


def test_stolen_online_key_rolls_a_role_back(publisher: Publisher, first: Device) -> None:
    before = publisher.bundle()
    publisher.order(publisher.release(2))
    first.installs()
    old = before.files[file_of(before, "adapters")]
    refused = first.refuses(publisher.forged(adapters=old))
    assert refused.reason is R.METADATA_ROLLBACK
    assert "adapters 2 is older than 3" in refused.detail


def test_stolen_online_key_drops_a_role(publisher: Publisher, first: Device) -> None:
    files = dict(publisher.bundle().files)
    snapshot = Metadata[Any].from_bytes(files[file_of(publisher.bundle(), "snapshot")])
    del snapshot.signed.meta["adapters.json"]
    assert first.reason(publisher.resign(files, snapshot)) is R.METADATA_ROLLBACK


def test_stolen_online_key_reuses_a_round_number(publisher: Publisher, first: Device) -> None:
    record = publisher.repository.release("stable-1")
    document = publisher.repository.round()
    other = type(document)(
        sequence=document.sequence,
        rollout="evil",
        salt="x",
        assignments=(Assignment(1, record.target, record.sha256),),
    )
    forged = roles.rounds(other, 99, publisher.now, publisher.online)
    assert first.reason(publisher.forged(rounds=forged)) is R.METADATA_ROLLBACK


def test_stolen_online_key_goes_back_to_an_older_round(publisher: Publisher, first: Device) -> None:
    old = publisher.repository.round()
    publisher.order(publisher.release(2))
    first.installs()
    forged = roles.rounds(old, 99, publisher.now, publisher.online)
    assert first.reason(publisher.forged(rounds=forged)) is R.METADATA_ROLLBACK


def test_stolen_online_key_sends_a_device_to_and_fro(publisher: Publisher, device: Device) -> None:
    """Each order is a valid one; so many of them a day are not followed, to spare the flash."""
    pair = publisher.release(1), publisher.release(2)
    for number in range(MAX_CHANGES):
        publisher.order(pair[number % 2])
        assert device.installs().name == pair[number % 2].name
    last = pair[(MAX_CHANGES - 1) % 2]
    publisher.order(pair[MAX_CHANGES % 2])
    verdict = device.accept()
    assert isinstance(verdict, Stay)
    assert "a day" in verdict.reason
    device.restart()
    assert isinstance(device.accept(), Stay)
    publisher.order(last, rollout="the same again")
    assert device.installs().name == last.name
    publisher.later(hours=25)
    publisher.refresh()
    publisher.order(pair[MAX_CHANGES % 2])
    assert device.installs().name == pair[MAX_CHANGES % 2].name


def test_a_clock_that_was_ahead_does_not_count_for_ever(
    publisher: Publisher, device: Device
) -> None:
    pair = publisher.release(1), publisher.release(2)
    for number in range(MAX_CHANGES):
        publisher.order(pair[number % 2])
        device.accept(now=publisher.now + timedelta(hours=20))
    publisher.order(pair[MAX_CHANGES % 2])
    assert isinstance(device.accept(), Stay)
    publisher.later(hours=46)
    publisher.refresh()
    assert device.installs().name == pair[MAX_CHANGES % 2].name


# What a stolen online key can't make


def test_stolen_online_key_forges_an_adapters_file(publisher: Publisher, first: Device) -> None:
    data = b"evil"
    forged = publisher.signed_adapters(statement(2), data, signers=[publisher.online])
    assert first.reason(publisher.forged(adapters=forged)) is R.METADATA_SIGNATURE


def test_stolen_online_key_lists_an_adapter_in_the_rounds_role(
    publisher: Publisher, first: Device
) -> None:
    evil = b"evil"
    sha256 = hashlib.sha256(evil).hexdigest()
    document = type(publisher.repository.round())(
        sequence=50,
        rollout="evil",
        salt="",
        assignments=(Assignment(10_000, "adapters/stable/2.airpeft", sha256),),
    )
    forged = roles.rounds(document, 50, publisher.now, publisher.online)
    target = roles.release_target(statement(2), len(evil), sha256)
    forged.signed.targets[target.path] = target
    forged.sign(publisher.online)
    refused = first.refuses(publisher.forged(rounds=forged))
    assert refused.reason is R.ROLES_DISAGREE
    assert (refused.release, refused.rollout, refused.sequence) == ("stable-2", "evil", 50)


def test_stolen_online_key_swaps_the_bytes_of_a_signed_release(
    publisher: Publisher, first: Device
) -> None:
    target = publisher.repository.release("stable-1").target
    document = type(publisher.repository.round())(
        sequence=50, rollout="", salt="", assignments=(Assignment(10_000, target, "e" * 64),)
    )
    forged = roles.rounds(document, 50, publisher.now, publisher.online)
    assert first.reason(publisher.forged(rounds=forged)) is R.ROLES_DISAGREE


def test_stolen_online_key_orders_an_old_release_below_the_floor(
    publisher: Publisher, device: Device
) -> None:
    one = publisher.release(1)
    publisher.release(2)
    publisher.order(publisher.release(3, floor=2))
    assert device.installs().name == "stable-3"
    publisher.order(one)
    refused = device.refuses()
    assert refused.reason is R.DOWNGRADE
    assert "below the signed floor 2" in refused.detail


def test_the_floor_stays_when_its_release_is_no_longer_listed(
    publisher: Publisher, device: Device
) -> None:
    one = publisher.release(1, floor=1)
    publisher.release(2, floor=2)
    device.accept()
    assert device.trust.state.floors == {"stable": 2}
    device.restart()
    kept = [publisher.repository.release("stable-1")]
    listed = [roles.release_target(r.statement, r.length, r.sha256) for r in kept]
    only_old = roles.sign(roles.adapters(listed, 4, publisher.now), publisher.adapter_keys)
    document = type(publisher.repository.round())(
        sequence=9,
        rollout="",
        salt="",
        assignments=(Assignment(10_000, one.target, one.sha256),),
    )
    order = roles.rounds(document, 9, publisher.now, publisher.online)
    assert device.reason(publisher.forged(adapters=only_old, rounds=order)) is R.DOWNGRADE


def test_the_base_model_lies_below_every_floor(publisher: Publisher, device: Device) -> None:
    publisher.order(publisher.release(1, floor=1))
    device.installs()
    publisher.order(Assignment(10_000))
    assert device.reason() is R.DOWNGRADE


@pytest.mark.parametrize(
    ("signers", "good"),
    [([0], False), ([0, 0], False), ([], False), ([1, 2], True), ([0, 1, 2], True)],
)
def test_threshold_of_the_adapter_keys(
    publisher: Publisher, first: Device, signers: list[int], good: bool
) -> None:
    chosen = [publisher.adapter_keys[i] for i in signers]
    forged = publisher.signed_adapters(statement(2), payload_of(2), signers=chosen)
    bundle = publisher.forged(adapters=forged)
    if good:
        assert first.installs(bundle).name == "stable-1"
    else:
        assert first.reason(bundle) is R.METADATA_SIGNATURE


def test_the_same_signature_listed_twice(publisher: Publisher, first: Device) -> None:
    signed = publisher.signed_adapters(
        statement(2), payload_of(2), signers=publisher.adapter_keys[:1]
    )
    twice = json.loads(signed)
    twice["signatures"] *= 2
    bundle = publisher.forged(adapters=signed)
    name = file_of(bundle, "adapters")
    assert first.reason(with_files(bundle, {name: json.dumps(twice).encode()})) in (
        R.METADATA_MALFORMED,
        R.METADATA_SIGNATURE,
    )


def test_keys_of_another_folder_sign_nothing(
    publisher: Publisher, first: Device, tmp_path: Path
) -> None:
    strangers = generate(tmp_path / "strangers", ["adapters-1", "adapters-2"]).signers("adapters-")
    forged = publisher.signed_adapters(statement(2), payload_of(2), signers=strangers)
    assert first.reason(publisher.forged(adapters=forged)) is R.METADATA_SIGNATURE


def test_a_timestamp_by_another_key(publisher: Publisher, first: Device, tmp_path: Path) -> None:
    stranger = generate(tmp_path / "stranger", ["online"]).signer("online")
    bundle = publisher.bundle()
    timestamp = Metadata[Any].from_bytes(bundle.files["timestamp.json"])
    timestamp.signed.version += 1
    timestamp.signatures.clear()
    timestamp.sign(stranger)
    forged = with_files(bundle, {"timestamp.json": roles.to_bytes(timestamp)})
    assert first.reason(forged) is R.METADATA_SIGNATURE


def test_names_that_leave_the_folder_are_never_targets(publisher: Publisher, first: Device) -> None:
    order = json.dumps(publisher.repository.round().to_custom())
    for evil in ("adapters/../../etc/passwd", "adapters/stable/../1.airpeft", "/etc/passwd"):
        custom = json.loads(order.replace("adapters/stable/1.airpeft", evil))
        custom["sequence"] += 1
        rounds = Metadata[Any].from_bytes(
            publisher.bundle().files[file_of(publisher.bundle(), "rounds")]
        )
        rounds.signed.version += 1
        rounds.signed.targets["rounds/current"].unrecognized_fields["custom"] = custom
        rounds.sign(publisher.online)
        assert first.reason(publisher.forged(rounds=rounds)) is R.METADATA_MALFORMED


# Roots


def rotated(
    publisher: Publisher, *, signers: Any, online: Any = None, lifetime_days: int = 365
) -> bytes:
    root = Metadata[Any].from_bytes(publisher.repository.root())
    root.signed.version = 2
    root.signed.expires = publisher.now + timedelta(days=lifetime_days)
    if online is not None:
        for role in ("timestamp", "snapshot"):
            root.signed.revoke_key(publisher.online.public_key.keyid, role)
            root.signed.add_key(online.public_key, role)
    root.signatures.clear()
    return roles.to_bytes(roles.sign(root, signers))


def test_a_root_by_one_key_of_two(publisher: Publisher, first: Device) -> None:
    evil = rotated(publisher, signers=publisher.root_keys[:1])
    assert first.reason(with_files(publisher.bundle(), {"2.root.json": evil})) is (
        R.METADATA_SIGNATURE
    )
    assert first.trust.state.root == 1


def test_a_revoked_online_key_is_dead_and_the_new_one_works(
    publisher: Publisher, first: Device, tmp_path: Path
) -> None:
    new = generate(tmp_path / "new", ["online"]).signer("online")
    root = rotated(publisher, signers=publisher.root_keys[1:], online=new)
    old_timestamp = with_files(publisher.bundle(), {"2.root.json": root})
    assert first.reason(old_timestamp) is R.METADATA_SIGNATURE
    assert first.trust.state.root == 2
    first.restart()
    # The old world is gone for good, also when the new root is hidden.
    assert first.reason(publisher.bundle()) is R.METADATA_SIGNATURE
    files = dict(old_timestamp.files)
    snapshot = Metadata[Any].from_bytes(files[file_of(old_timestamp, "snapshot")])
    snapshot.signatures.clear()
    publisher.online = new
    assert first.installs(publisher.resign(files, snapshot)).name == "stable-1"


def test_fast_forward_by_a_stolen_key_is_cured_by_a_rotation(
    publisher: Publisher, first: Device, tmp_path: Path
) -> None:
    files = dict(publisher.bundle().files)
    snapshot = Metadata[Any].from_bytes(files[file_of(publisher.bundle(), "snapshot")])
    snapshot.signed.version = 2**50
    first.installs(publisher.resign(dict(files), snapshot))
    assert first.reason(publisher.bundle()) is R.METADATA_ROLLBACK
    new = generate(tmp_path / "new", ["online"]).signer("online")
    files["2.root.json"] = rotated(publisher, signers=publisher.root_keys, online=new)
    publisher.online = new
    snapshot.signed.version = 5
    snapshot.signatures.clear()
    assert first.installs(publisher.resign(files, snapshot)).name == "stable-1"
    assert first.trust.state.version("snapshot") == 6


def test_a_root_that_is_hidden_is_missed_for_as_long_as_the_old_one_lives(
    publisher: Publisher, first: Device, tmp_path: Path
) -> None:
    """Somebody between a device and the fleet has the old online key, and hides root 2.

    The device can't know; what ends it is the old root's expiry, whatever is dated anew.
    """
    new = generate(tmp_path / "new", ["online"]).signer("online")
    assert rotated(publisher, signers=publisher.root_keys, online=new)
    publisher.now = START + timedelta(days=100)
    publisher.refresh()  # the thief dates timestamp, snapshot and rounds anew
    assert first.installs().name == "stable-1"
    publisher.now = START + timedelta(days=366)
    publisher.refresh()
    refused = first.refuses()
    assert refused.reason is R.METADATA_EXPIRED
    assert "root" in refused.detail


def test_an_older_root_than_the_one_trusted_before(publisher: Publisher, first: Device) -> None:
    root = rotated(publisher, signers=publisher.root_keys)
    first.installs(with_files(publisher.bundle(), {"2.root.json": root}))
    shutil.rmtree(first.folder / "roots")
    first.restart()
    assert first.reason(publisher.bundle()) is R.METADATA_ROLLBACK
    assert first.installs(with_files(publisher.bundle(), {"2.root.json": root}))


def test_a_damaged_stored_root_is_replaced_from_the_bundle(
    publisher: Publisher, first: Device
) -> None:
    root = rotated(publisher, signers=publisher.root_keys)
    both = with_files(publisher.bundle(), {"2.root.json": root})
    first.installs(both)
    (first.folder / "roots" / "2.root.json").write_bytes(b"{}")
    first.restart()
    assert first.installs(both)
    assert (first.folder / "roots" / "2.root.json").read_bytes() == root


def test_an_expired_root(publisher: Publisher, first: Device) -> None:
    root = rotated(publisher, signers=publisher.root_keys, lifetime_days=0)
    publisher.later(hours=1)
    assert first.reason(with_files(publisher.bundle(), {"2.root.json": root})) is R.METADATA_EXPIRED


def test_enrolment_takes_only_a_signed_root(tmp_path: Path, publisher: Publisher) -> None:
    root = publisher.repository.root()
    for bad in (b"", b"{}", rebuilt(root, lambda d: d["signatures"].clear()), b"\xff" * 100):
        with pytest.raises(Rejected) as caught:
            Trust.bootstrap(tmp_path / "fresh", bad)
        assert caught.value.reason is R.METADATA_SIGNATURE


# Time


def test_an_expired_timestamp_freezes_nothing_new(publisher: Publisher, first: Device) -> None:
    publisher.later(hours=25)
    refused = first.refuses()
    assert refused.reason is R.METADATA_EXPIRED
    publisher.refresh()
    assert first.installs().name == "stable-1"


@pytest.mark.parametrize("clock", [datetime(1970, 1, 1, tzinfo=UTC), START - timedelta(days=1)])
def test_a_frozen_timestamp_and_a_clock_set_back(
    publisher: Publisher, first: Device, clock: datetime
) -> None:
    frozen = publisher.bundle()
    publisher.later(hours=30)
    publisher.refresh()
    first.accept(now=publisher.now)  # learns that it is later now
    first.restart()
    # The freezer has the online key too: a newer version, but the old dates.
    timestamp = Metadata[Any].from_bytes(frozen.files["timestamp.json"])
    timestamp.signed.version = 1_000
    timestamp.sign(publisher.online)
    forged = with_files(frozen, {"timestamp.json": roles.to_bytes(timestamp)})
    assert first.reason(forged, now=clock) is R.METADATA_EXPIRED


def test_a_new_device_with_no_clock_knows_when_its_software_was_built(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher.order(publisher.release(1))
    old = publisher.bundle()
    built = int((START + timedelta(days=40)).timestamp())
    device = Device(tmp_path / "new", publisher, agent_built_unix=built)
    assert device.reason(old, now=datetime(1970, 1, 1, tzinfo=UTC)) is R.METADATA_EXPIRED


@pytest.mark.parametrize("role", ["snapshot", "rounds"])
def test_an_expired_file_under_a_fresh_timestamp_and_a_clock_set_back(
    publisher: Publisher, device: Device, role: str
) -> None:
    """The timestamp's own date tells a device without a clock that the other file is too old."""
    publisher.order(publisher.release(1))
    bundle = publisher.bundle()
    old = Metadata[Any].from_bytes(bundle.files[file_of(bundle, role)])
    old.signed.expires = publisher.now + timedelta(hours=1)
    old.signed.version += 1
    old.sign(publisher.online)
    publisher.later(hours=20)
    if role == "snapshot":
        old.signed.version -= 1
        forged = publisher.resign(dict(bundle.files), old)
    else:
        forged = publisher.forged(rounds=old)
    assert device.reason(forged, now=datetime(1970, 1, 1, tzinfo=UTC)) is R.METADATA_EXPIRED


def test_a_clock_a_year_behind_recovers(publisher: Publisher, first: Device) -> None:
    publisher.later(hours=30)
    publisher.refresh()
    first.accept(now=START - timedelta(days=365))
    assert first.trust.state.time_floor == int(publisher.now.timestamp())


def test_a_clock_a_year_ahead_says_so(first: Device) -> None:
    refused = first.refuses(now=START + timedelta(days=365))
    assert refused.reason is R.METADATA_EXPIRED
    assert "2027-05-04" in refused.detail


def test_a_stolen_online_key_dates_metadata_in_the_far_future(
    publisher: Publisher, first: Device
) -> None:
    timestamp = Metadata[Any].from_bytes(publisher.bundle().files["timestamp.json"])
    timestamp.signed.version += 1
    timestamp.signed.expires = datetime(2200, 1, 1, tzinfo=UTC)
    timestamp.signed.unrecognized_fields[SIGNED_UNIX] = 7_000_000_000
    timestamp.sign(publisher.online)
    forged = with_files(publisher.bundle(), {"timestamp.json": roles.to_bytes(timestamp)})
    assert first.reason(forged) is R.CLOCK
    assert first.trust.state.time_floor == int(START.timestamp())
    assert first.installs().name == "stable-1"


def test_the_engine_judges_by_our_clock_and_not_by_its_own(
    publisher: Publisher, first: Device
) -> None:
    """python-tuf's reference_time is private; this test fails if it is renamed or ignored."""
    far = datetime(2101, 1, 1, tzinfo=UTC)  # valid by the machine's clock, expired by ours
    timestamp = Metadata[Any].from_bytes(publisher.bundle().files["timestamp.json"])
    timestamp.signed.version += 1
    timestamp.signed.expires = datetime(2100, 1, 1, tzinfo=UTC)
    timestamp.sign(publisher.online)
    forged = with_files(publisher.bundle(), {"timestamp.json": roles.to_bytes(timestamp)})
    assert first.reason(forged, now=far) is R.METADATA_EXPIRED
    ancient = START - timedelta(days=3000)  # expired by the machine's clock, valid by ours
    assert ancient.year < datetime.now(UTC).year
    assert first.installs(forged)


# What is in the files


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\x00" * 100,
        b"[" * 4_000,
        b"[" * 300_000,
        b'{"a":' * 4_000,
        b"9" * 5_000,
        b'{"signed": {}, "signatures": []}',
        b"null",
        "{}".encode("utf-16"),
    ],
    ids=lambda junk: f"{bytes(junk[:6])!r}",
)
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "adapters", "rounds"])
def test_junk_instead_of_metadata(
    publisher: Publisher, first: Device, role: str, junk: bytes
) -> None:
    bundle = publisher.bundle()
    bad = with_files(bundle, {file_of(bundle, role): junk})
    assert first.reason(bad) is R.METADATA_MALFORMED
    assert first.installs().name == "stable-1"


@pytest.mark.parametrize(
    ("name", "size"),
    [("timestamp.json", MAX_TIMESTAMP_BYTES + 1), ("9.adapters.json", MAX_FILE_BYTES + 1)],
)
def test_files_that_are_too_large(
    publisher: Publisher, first: Device, name: str, size: int
) -> None:
    bad = with_files(publisher.bundle(), {name: b" " * size})
    assert first.reason(bad) is R.METADATA_MALFORMED


def test_too_many_files(publisher: Publisher, first: Device) -> None:
    many = {f"{i}.nothing.json": b"" for i in range(3_000)}
    assert first.reason(with_files(publisher.bundle(), many)) is R.METADATA_MALFORMED


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": True},
        {"sequence": -1},
        {"sequence": 1.5},
        {"sequence": "5"},
        {"assignments": None},
        {"assignments": [{"basis_points": 10_001, "target": "", "sha256": ""}]},
        {"assignments": [{"basis_points": 1, "target": "adapters/stable/1.airpeft", "sha256": ""}]},
        {"assignments": [7]},
        {"salt": None},
        {"critical": ["not_before"], "not_before": 5},
        {"critical": "x"},
        {"critical": [["x"]]},
    ],
)
def test_a_round_that_is_not_one(
    publisher: Publisher, first: Device, change: dict[str, Any]
) -> None:
    rounds = Metadata[Any].from_bytes(
        publisher.bundle().files[file_of(publisher.bundle(), "rounds")]
    )
    rounds.signed.version += 1
    custom = rounds.signed.targets["rounds/current"].unrecognized_fields["custom"]
    custom.update({"sequence": 5, **change})
    try:
        rounds.sign(publisher.online)
    except Exception:
        assert isinstance(change.get("sequence"), float)  # canonical JSON has no floats
        return
    assert first.reason(publisher.forged(rounds=rounds)) is R.METADATA_MALFORMED


def test_fields_of_later_versions_are_ignored_unless_critical(
    publisher: Publisher, first: Device
) -> None:
    rounds = Metadata[Any].from_bytes(
        publisher.bundle().files[file_of(publisher.bundle(), "rounds")]
    )
    rounds.signed.version += 1
    custom = rounds.signed.targets["rounds/current"].unrecognized_fields["custom"]
    custom.update({"sequence": 5, "weather": {"from": 1}})
    rounds.sign(publisher.online)
    assert first.installs(publisher.forged(rounds=rounds)).sequence == 5


def test_a_statement_under_the_name_of_another_release(publisher: Publisher, first: Device) -> None:
    record = publisher.repository.release("stable-1")
    mixed = TargetFile(
        record.length,
        {"sha256": record.sha256},
        record.target,
        {"custom": statement(7).to_custom()},
    )
    forged = roles.sign(roles.adapters([mixed], 3, publisher.now), publisher.adapter_keys)
    assert first.reason(publisher.forged(adapters=forged)) is R.METADATA_MALFORMED


# Whether it is for this device


def test_made_for_another_base(publisher: Publisher, device: Device) -> None:
    publisher.order(publisher.release(1, base_digest=OTHER_BASE))
    assert device.reason() is R.WRONG_BASE


def test_made_for_another_runtime(publisher: Publisher, device: Device) -> None:
    publisher.order(publisher.release(1, runtime=("llamacpp", "onnx")))
    assert device.reason() is R.UNSUPPORTED_RUNTIME


def test_what_this_device_has_reverted_before(publisher: Publisher, first: Device) -> None:
    first.trust.remember_bad(first.installs())
    first.restart()
    assert first.reason() is R.KNOWN_BAD
    publisher.order(publisher.release(2))
    assert first.installs().name == "stable-2"


# What is learnt is durable first


def test_nothing_is_allowed_that_could_not_be_remembered(
    publisher: Publisher, first: Device
) -> None:
    publisher.order(publisher.release(2))
    (first.folder / "trust.json.partial").mkdir()
    with pytest.raises(StorageError):
        first.accept()
    (first.folder / "trust.json.partial").rmdir()
    assert first.installs().name == "stable-2"


def test_a_refusal_teaches_too(publisher: Publisher, first: Device) -> None:
    old = publisher.bundle()
    publisher.refresh()
    new = publisher.bundle()
    assert first.reason(with_files(new, {file_of(new, "rounds"): b"{}"})) is R.METADATA_MALFORMED
    first.restart()
    assert first.reason(old) is R.METADATA_ROLLBACK


def test_an_empty_bundle(first: Device) -> None:
    assert first.reason(MetadataBundle({})) is R.METADATA_MALFORMED
