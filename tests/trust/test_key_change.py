"""Drills: keys are rotated, revoked and renewed, and devices follow or refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, MetaFile

from clients.trust import Stay, Trust
from federation import roles
from federation.circles import KeyChangeError
from federation.key_change import KeyChange
from federation.key_request import assemble_change, progress, read_change, sign_change
from federation.published import PublishError
from federation.repository import Repository, RepositoryError
from federation.verification import verify_repository
from protos.messages import MetadataBundle, RejectReason
from protos.signed import REVOKED_KEYS, Assignment, Revocation, RoundDocument, Standing
from tests.trust.ceremony import Ceremony
from tests.trust.fleet_of_one import Device, Publisher, file_of, payload_of, statement, with_files
from tests.trust.power_cut import every_step

R = RejectReason
ROOTS = ("root-1", "root-2")


@pytest.fixture
def people(publisher: Publisher, tmp_path: Path) -> Ceremony:
    return Ceremony(publisher, tmp_path / "people")


@pytest.fixture
def first(publisher: Publisher, device: Device) -> Device:
    """A device that runs stable-1."""
    publisher.order(publisher.release(1))
    assert device.installs().name == "stable-1"
    return device


def bundle_with(publisher: Publisher, **changed: bytes) -> MetadataBundle:
    """What a thief of the online key serves, with any file in any version."""
    files = dict(publisher.bundle().files)
    snapshot = Metadata[Any].from_bytes(files[file_of(publisher.bundle(), "snapshot")])
    for role, data in changed.items():
        version = Metadata[Any].from_bytes(data).signed.version
        files[f"{version}.{role}.json"] = data
        snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(version, data, ["sha256"])
    return publisher.resign(files, snapshot)


# Root


def test_a_device_follows_many_rotations_at_once(
    publisher: Publisher, first: Device, people: Ceremony, tmp_path: Path
) -> None:
    """Every root key is replaced, one after the other, while the device sleeps."""
    for old, new, signing in (
        ("root-1", "root-4", ["root-1", "root-2"]),
        ("root-2", "root-5", ["root-2", "root-4"]),
        ("root-3", "root-6", ["root-4", "root-5"]),
    ):
        people.carry_out(people.swap("root", old, new), [*signing, new])
    publisher.order(publisher.release(2))
    assert publisher.repository.versions()["root"] == 4
    assert first.installs().name == "stable-2"
    assert first.trust.state.root == 4
    first.restart()
    assert first.installs().name == "stable-2"
    # Whoever enrols now begins at the newest root; a root of old, and old keys, mean nothing.
    assert json.loads(publisher.repository.root())["signed"]["version"] == 4
    fresh = Device(tmp_path / "fresh", publisher)
    assert fresh.installs().name == "stable-2"
    report = verify_repository(
        publisher.repository.folder, publisher.repository.root(), now=publisher.now
    )
    assert report.sound
    (seal,) = [seal for seal in report.roles if seal.role == "root"]
    assert seal.signed_by == ("root-4", "root-5", "root-6")


@pytest.mark.parametrize(
    ("signing", "good"),
    [
        (["root-1", "root-2", "root-4"], True),  # two of before, two of after
        (["root-1", "root-3", "root-4"], True),
        (["root-2", "root-3"], False),  # after: root-3 alone
        (["root-1", "root-4"], False),  # before: root-1 alone
        (["root-4"], False),
        ([], False),
    ],
)
def test_a_new_root_needs_a_threshold_of_old_and_of_new_keys(
    publisher: Publisher, first: Device, people: Ceremony, signing: list[str], good: bool
) -> None:
    request = people.request(people.swap("root", "root-2", "root-4"))
    people.sign(request, signing)
    missing = sum(need.missing for need in progress(request))
    assert (missing == 0) == good
    before = publisher.bundle()
    # What the repository refuses, a device would have refused as well.
    forged = with_files(before, {"2.root.json": assemble_change(request)["root"]})
    if not good:
        with pytest.raises(PublishError, match="/2 keys"):
            people.publish(request)
        assert publisher.bundle() == before
        assert first.reason(forged) is R.METADATA_SIGNATURE
        return
    people.publish(request)
    people.publish(request)  # again changes nothing
    assert publisher.repository.versions()["root"] == 2
    assert first.installs().name == "stable-1"
    with pytest.raises(PublishError, match="version"):
        people.publish(_older(request, people))


def _older(request: Path, people: Ceremony) -> Path:
    """The same request under other dates, so that it is not the published one."""
    copy = shutil.copytree(request, request.with_name("older"))
    doc = json.loads((copy / "after" / "root.json").read_bytes())
    doc["signed"]["expires"] = "2027-01-01T00:00:00Z"
    (copy / "after" / "root.json").write_text(json.dumps(doc))
    shutil.rmtree(copy / "signatures")
    people.sign(copy, ["root-1", "root-2", "root-4"])
    return copy


def test_a_threshold_changes(publisher: Publisher, first: Device, people: Ceremony) -> None:
    people.carry_out(KeyChange(thresholds={"root": 3}), ["root-1", "root-2", "root-3"])
    assert first.installs().name == "stable-1"
    request = people.request(people.swap("root", "root-3", "root-4"))
    people.sign(request, ["root-1", "root-2", "root-4"])
    with pytest.raises(PublishError, match="2/3"):
        people.publish(request)
    people.sign(request, ["root-3"])
    people.publish(request)
    assert first.installs().name == "stable-1"


# Adapter keys


def test_a_revoked_adapter_key_signs_nothing_any_more(
    publisher: Publisher, first: Device, people: Ceremony
) -> None:
    change = people.swap("adapters", "adapters-1", "adapters-4")
    people.carry_out(change, [*ROOTS, "adapters-3", "adapters-4"])
    keyid = publisher.keys.public("adapters-1").keyid
    assert first.installs().name == "stable-1"
    data = payload_of(2)
    both = [people.known["adapters-1"], people.known["adapters-2"]]
    signed = publisher.signed_adapters(statement(2), data, signers=both)
    with pytest.raises(PublishError, match="1/2"):
        publisher.repository.publish_release(signed, data, now=publisher.now)
    assert first.reason(bundle_with(publisher, adapters=signed)) is R.METADATA_SIGNATURE
    good = [people.known["adapters-2"], people.known["adapters-4"]]
    signed = publisher.signed_adapters(statement(2), data, signers=good)
    publisher.order(publisher.repository.publish_release(signed, data, now=publisher.now))
    assert first.installs().name == "stable-2"
    root = Metadata[Any].from_bytes(publisher.repository.root()).signed
    assert root.unrecognized_fields[REVOKED_KEYS] == [keyid]


def test_an_old_targets_file_does_not_bring_a_revoked_key_back(
    publisher: Publisher, first: Device, people: Ceremony, tmp_path: Path
) -> None:
    """Two adapter keys and the online key are stolen; the adapter keys have been revoked since.

    Targets of before the revocation is still signed by root keys that nobody replaced, and a new
    device has no marks. What saves it is the list of revoked keys in its root.
    """
    old = {r: publisher.repository.offline()[r] for r in ("targets", "adapters")}
    evil = b"evil"
    forged = publisher.signed_adapters(statement(7), evil)
    new = people.make("adapters-4", "adapters-5")
    change = KeyChange(
        drop=("adapters-1", "adapters-2"), add={"adapters": tuple(s.public_key for s in new)}
    )
    people.carry_out(change, [*ROOTS, "adapters-4", "adapters-5"])
    sha256 = hashlib.sha256(evil).hexdigest()
    order = RoundDocument(
        sequence=9,
        rollout="evil",
        salt="",
        assignments=(Assignment(10_000, "adapters/stable/7.airpeft", sha256),),
    )
    rounds = roles.to_bytes(roles.rounds(order, 9, publisher.now, publisher.online))
    attack = bundle_with(publisher, targets=old["targets"], adapters=forged, rounds=rounds)
    fresh = Device(tmp_path / "fresh", publisher)
    assert fresh.reason(attack) is R.METADATA_SIGNATURE
    # The attack is a real one: to a device that knows the first root alone it looks right.
    naive = Device(tmp_path / "naive", publisher)
    first_root = (publisher.repository.folder / "metadata" / "1.root.json").read_bytes()
    naive.trust = Trust.bootstrap(tmp_path / "naive2", first_root)
    unlisted = with_files(attack, {"2.root.json": None})
    assert naive.installs(unlisted).name == "stable-7"
    assert first.reason(attack) is R.METADATA_SIGNATURE


def test_keys_are_lost_and_the_rest_cannot_reach_the_threshold(people: Ceremony) -> None:
    with pytest.raises(KeyChangeError, match="add keys"):
        people.request(KeyChange(drop=("adapters-1", "adapters-2")))
    people.carry_out(
        KeyChange(drop=("adapters-1",), thresholds={"adapters": 2}),
        [*ROOTS, "adapters-2", "adapters-3"],
    )


# The online key


def test_the_online_key_is_replaced(publisher: Publisher, first: Device, people: Ceremony) -> None:
    people.carry_out(people.swap("online", "online", "online-2"), ROOTS)
    stale = publisher.bundle()
    timestamp = Metadata[Any].from_bytes(stale.files["timestamp.json"])
    timestamp.signed.version += 50
    timestamp.sign(publisher.online)  # the old key
    forged = with_files(stale, {"timestamp.json": roles.to_bytes(timestamp)})
    assert first.reason(forged) is R.METADATA_SIGNATURE
    assert first.installs().name == "stable-1"
    publisher.later(hours=10)
    publisher.refresh()
    publisher.order(publisher.release(2))
    assert first.installs().name == "stable-2"
    with pytest.raises(RepositoryError, match="not the one"):
        Repository(publisher.repository.folder, publisher.online)


def test_a_stolen_online_key_has_run_every_number_up_on_devices_and_server(
    publisher: Publisher, first: Device, people: Ceremony
) -> None:
    """Fast-forward: the thief wrote to the server's disk, too. A new key starts anew."""
    thief = publisher.online
    huge = 2**52
    files = dict(publisher.bundle().files)
    order = RoundDocument(
        sequence=huge,
        rollout="evil",
        salt="",
        assignments=publisher.repository.round().assignments,
    )
    rounds = roles.to_bytes(roles.rounds(order, huge, publisher.now, thief))
    snapshot = Metadata[Any].from_bytes(files[file_of(publisher.bundle(), "snapshot")])
    snapshot.signed.version = huge
    snapshot.signed.meta["rounds.json"] = MetaFile.from_data(huge, rounds, ["sha256"])
    snapshot.sign(thief)
    data = roles.to_bytes(snapshot)
    timestamp = roles.to_bytes(roles.timestamp(huge, data, huge, publisher.now, thief))
    where = publisher.repository.folder / "metadata"
    for name, content in (
        (f"{huge}.rounds.json", rounds),
        (f"{huge}.snapshot.json", data),
        ("timestamp.json", timestamp),
    ):
        (where / name).write_bytes(content)
    publisher.repository = Repository(publisher.repository.folder, thief)
    assert first.installs().sequence == huge
    people.carry_out(people.swap("online", "online", "online-2"), ROOTS, hold=True)
    assert publisher.repository.versions()["timestamp"] == 1
    verdict = first.accept()
    assert isinstance(verdict, Stay), "held until somebody orders again"
    publisher.order(publisher.release(2))
    assert first.installs().name == "stable-2"
    assert first.trust.state.version("timestamp") < 10
    assert first.trust.state.sequence < 10


def test_holding_replaces_what_a_thief_ordered(
    publisher: Publisher, first: Device, people: Ceremony
) -> None:
    publisher.release(2)
    publisher.order(publisher.repository.release("stable-2"), rollout="evil")
    people.carry_out(people.swap("online", "online", "online-2"), ROOTS, hold=True)
    assert isinstance(first.accept(), Stay)
    assert publisher.repository.round().assignments == ()


# Several roles that sign releases


def test_a_tenant_with_keys_of_its_own(
    publisher: Publisher, first: Device, people: Ceremony
) -> None:
    keys = people.make("acme-1", "acme-2", "acme-3")
    change = KeyChange(
        delegate={"adapters-acme": ("acme", "acme-*")},
        add={"adapters-acme": tuple(k.public_key for k in keys)},
    )
    people.carry_out(change, [*ROOTS, "acme-1", "acme-2"])
    data = payload_of(1, "acme")
    new = statement(1, channel="acme")
    mine = Metadata[Any].from_bytes(publisher.repository.adapters("acme")).signed
    target = roles.release_target(new, len(data), hashlib.sha256(data).hexdigest())
    unsigned = roles.adapters([target], mine.version + 1, publisher.now)
    signed = roles.to_bytes(roles.sign(unsigned, publisher.adapter_keys))
    with pytest.raises(PublishError, match="0/2"):  # whoever signs for the rest signs nothing here
        publisher.repository.publish_release(signed, data, now=publisher.now)
    signed = roles.to_bytes(roles.sign(unsigned, keys[:2]))
    record = publisher.repository.publish_release(signed, data, now=publisher.now)
    publisher.order(record)
    assert first.installs().name == "acme-1"
    assert publisher.repository.read(record.path) == data
    names = [r.name for r in publisher.repository.releases()]
    assert names == ["acme-1", "stable-1"]
    # Nor may the tenant speak against anybody else's releases.
    stable = publisher.repository.release("stable-1")
    evil = Standing(
        revoked=(Revocation(release="stable-1", sha256=stable.sha256, why="spite"),),
        floors={"stable": 9},
    )
    forged = roles.sign(roles.adapters([target], 3, publisher.now, evil), keys[:2])
    bundle = publisher.forged(**{"adapters-acme": forged})
    first.accept(bundle)
    assert first.trust.revoked(stable.sha256) is None
    assert first.trust.state.floors == {}
    with pytest.raises(KeyChangeError, match="has releases that adapters has signed"):
        people.request(
            KeyChange(
                delegate={"adapters-x": ("stable",)}, add={"adapters-x": (keys[0].public_key,)}
            )
        )


# Renewal


def test_renewal_before_anything_expires(
    publisher: Publisher, first: Device, people: Ceremony
) -> None:
    publisher.later(days=170)
    publisher.refresh()
    people.carry_out(KeyChange(renew=True), [*ROOTS, "adapters-1", "adapters-3"])
    publisher.later(days=100)
    publisher.refresh()
    assert first.installs().name == "stable-1"
    assert publisher.repository.versions()["root"] == 2


# Requests


def test_signing_works_without_any_network(
    people: Ceremony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the request to a signature file; then the file alone comes back."""
    request = people.request(people.swap("root", "root-2", "root-4"))
    there = shutil.copytree(request, tmp_path / "offline")

    def no_network(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    trusted = people.publisher.repository.root()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", no_network)
        files = [
            sign_change(there, people.known[name], out=tmp_path / f"{name}.json", roots=[trusted])
            for name in ("root-1", "root-2", "root-4")
        ]
    assert not (there / "signatures").exists()
    assert sum(need.missing for need in progress(request)) == 6
    assert sum(need.missing for need in progress(request, files)) == 0
    assert files[0].stat().st_size < 2_000


def test_a_key_without_a_say_does_not_sign(people: Ceremony) -> None:
    request = people.request(people.swap("root", "root-2", "root-4"))
    with pytest.raises(KeyChangeError, match="no part"):
        people.sign(request, ["adapters-1"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("release removed", "other releases"),
        ("release revoked", "other releases"),
        ("version", "make the request again"),
        ("target in targets", "targets lists nothing"),
        ("key in two circles", "keys of its own"),
        ("revoked key back", "come back"),
        ("role gone", "never be taken away"),
        ("other start", "does not start"),
        ("snapshots", "consistent"),
        ("junk", "not signed metadata"),
        ("other kind", "metadata"),
    ],
)
def test_a_request_that_was_tampered_with_is_not_signed(
    publisher: Publisher, first: Device, people: Ceremony, what: str, message: str
) -> None:
    people.carry_out(
        people.swap("adapters", "adapters-1", "adapters-4"), [*ROOTS, "adapters-2", "adapters-4"]
    )
    change = KeyChange(renew=True)
    request = people.request(change)
    after, before = request / "after", request / "before"
    docs = {path.stem: json.loads(path.read_bytes()) for path in after.iterdir()}
    root, targets, adapters = (docs[name]["signed"] for name in ("root", "targets", "adapters"))
    if what == "release removed":
        adapters["targets"] = {}
    elif what == "release revoked":
        adapters["x-airpeft-standing"] = {"revoked": [], "floors": {"stable": 3}}
    elif what == "version":
        root["version"] += 1
    elif what == "target in targets":
        targets["targets"]["x"] = {"length": 1, "hashes": {"sha256": "ab" * 32}}
    elif what == "key in two circles":
        stolen = targets["delegations"]["keys"]
        keyid = targets["delegations"]["roles"][0]["keyids"][0]
        root["keys"][keyid] = stolen[keyid]
        for name in ("root", "targets"):
            root["roles"][name]["keyids"].append(keyid)
    elif what == "revoked key back":
        root["x-airpeft-revoked-keys"] = []
    elif what == "role gone":
        targets["delegations"]["roles"] = [
            r for r in targets["delegations"]["roles"] if r["name"] == "rounds"
        ]
        docs.pop("adapters")
        (after / "adapters.json").unlink()
        (before / "adapters.json").unlink()
    elif what == "other start":
        doc = json.loads((before / "targets.json").read_bytes())
        doc["signatures"] = doc["signatures"][:1]
        (before / "targets.json").write_text(json.dumps(doc))
    elif what == "snapshots":
        root["consistent_snapshot"] = False
    for name, doc in docs.items():
        (after / f"{name}.json").write_text(json.dumps(doc))
    if what == "junk":
        (after / "root.json").write_text("[")
    elif what == "other kind":
        (after / "root.json").write_bytes((after / "targets.json").read_bytes())
    with pytest.raises(KeyChangeError, match=message):
        sign_change(request, people.known["root-1"])


def test_changes_that_cannot_be(people: Ceremony, publisher: Publisher) -> None:
    root_1 = publisher.keys.public("root-1")
    (strange,) = people.make("adapters-9")
    for change, message in (
        (KeyChange(), "nothing changes"),
        (KeyChange(drop=("carol",)), "no key is called"),
        (KeyChange(add={"nobody": (strange.public_key,)}), "no circle"),
        (KeyChange(add={"adapters": (root_1,)}), "there already"),
        (KeyChange(thresholds={"adapters": 4}), "need 4"),
        (KeyChange(thresholds={"online": 2}), "stays 1"),
        (KeyChange(thresholds={"nobody": 2}), "no circle"),
        (KeyChange(add={"online": (strange.public_key,)}), "one and the same online key"),
        (KeyChange(delegate={"rounds-2": ("x",)}), "must be new"),
        (KeyChange(delegate={"adapters-x": ("x",)}), "needs channels and keys"),
    ):
        with pytest.raises(KeyChangeError, match=message):
            people.request(change)


def test_signatures_of_another_request_and_other_files(people: Ceremony, tmp_path: Path) -> None:
    one = people.request(KeyChange(renew=True))
    other = people.request(KeyChange(thresholds={"root": 3}))
    path = sign_change(other, people.known["root-1"], out=tmp_path / "s.json")
    with pytest.raises(KeyChangeError, match="another request"):
        assemble_change(one, [path])
    path.write_text("[]")
    with pytest.raises(KeyChangeError, match="not a signature file"):
        assemble_change(one, [path])
    with pytest.raises(KeyChangeError, match="keys rotate"):
        read_change(tmp_path / "nothing")


def test_another_gateway_goes_on_with_the_new_online_key(
    publisher: Publisher, people: Ceremony
) -> None:
    request = people.request(people.swap("online", "online", "online-2"))
    people.sign(request, ROOTS)
    folder, new = publisher.repository.folder, people.known["online-2"]
    other = Repository(folder, publisher.online, lambda _: new)
    publisher.repository.publish_keys(
        assemble_change(request), now=publisher.now, online=lambda _: new
    )
    before = publisher.repository.versions()["timestamp"]
    other.refresh_timestamp(publisher.now)
    assert other.online_keyid() == new.public_key.keyid
    assert Repository(folder, new).versions()["timestamp"] == before + 1


# Durability


def test_killed_at_every_step_of_a_change_of_keys(
    publisher: Publisher, people: Ceremony, tmp_path: Path, device: Device
) -> None:
    """A root is found by its number, so a change is written down as a whole before it is done."""
    publisher.order(publisher.release(1))
    device.installs()
    request = people.request(people.swap("online", "online", "online-2"))
    people.sign(request, ROOTS)
    files, new = assemble_change(request), people.known["online-2"]
    numbers = count()

    def fresh() -> Path:
        return shutil.copytree(publisher.repository.folder, tmp_path / "cuts" / str(next(numbers)))

    def work(folder: Path) -> Any:
        def change() -> None:
            repository = Repository(folder, publisher.online)
            repository.publish_keys(files, now=publisher.now, online=lambda _: new)

        return change

    seen = set()
    for where, folder in every_step(fresh, work):
        try:
            repository = Repository(folder, publisher.online)
        except RepositoryError:
            repository = Repository(folder, new)
        version = repository.versions()["root"]
        seen.add(version)
        repository.publish_keys(files, now=publisher.now, online=lambda _: new)
        repository = Repository(folder, new)
        assert repository.versions()["root"] == 2, where
        assert not (folder / "change").exists(), where
        fresh_device = Device(folder / "device", publisher)
        assert fresh_device.installs(repository.bundle()).name == "stable-1", where
    assert seen == {1, 2}


def test_a_full_disk_changes_nothing(publisher: Publisher, people: Ceremony, first: Device) -> None:
    request = people.request(people.swap("root", "root-2", "root-4"))
    people.sign(request, ["root-1", "root-2", "root-4"])
    before = publisher.bundle()
    blocker = publisher.repository.folder / "change.partial"
    blocker.write_text("in the way")
    with pytest.raises(Exception, match="change"):
        people.publish(request)
    assert publisher.bundle() == before
    blocker.unlink()
    people.publish(request)
    assert first.installs().name == "stable-1"


def test_an_expired_change_is_not_published(publisher: Publisher, people: Ceremony) -> None:
    request = people.request(KeyChange(renew=True))
    people.sign(request, [*ROOTS, "adapters-1", "adapters-2"])
    publisher.now += timedelta(days=400)
    with pytest.raises(PublishError, match="expired"):
        people.publish(request)
