"""Whoever makes a request is not believed: what signers and servers refuse to sign and to publish.

Every attack here is mounted by somebody who makes requests and holds no key, or one key of two.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer._utils import compute_default_keyid
from tuf.api.metadata import Metadata, Signature

from federation import release, roles
from federation.anchor import AnchorError
from federation.circles import KeyChangeError
from federation.key_change import KeyChange, Offline, check_change
from federation.key_request import make_change, read_change, sign_change
from federation.keys import KeyFileError, generate, read_public
from federation.metadata_files import verify
from federation.provenance import evaluation
from federation.published import PublishError, RepositoryError
from federation.release import ReleaseError, make_revocation
from federation.release_words import day
from federation.verification import verify_repository
from protos.messages import RejectReason
from tests.trust.ceremony import Ceremony
from tests.trust.fleet_of_one import Device, Publisher, payload_of, statement
from tests.trust.test_release import adapter, folder, make

__all__ = ["adapter", "folder"]  # fixtures

NAMELESS = "ab" * 32


@pytest.fixture
def people(publisher: Publisher, tmp_path: Path) -> Ceremony:
    return Ceremony(publisher, tmp_path / "people")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    doc = json.loads(path.read_bytes())
    change(doc["signed"])
    path.write_text(json.dumps(doc))


# Keys


@pytest.mark.parametrize("scheme", ["ed25519", "ecdsa-p256"])
def test_another_key_under_a_known_identifier_is_not_signed(tmp_path: Path, scheme: str) -> None:
    """People compare identifiers: nothing would show them that adapters-3 is somebody else now."""
    publisher = Publisher(tmp_path / "publisher", scheme=scheme)
    people = Ceremony(publisher, tmp_path / "people")
    request = people.request(KeyChange(renew=True))
    keyid = publisher.keys.public("adapters-3").keyid
    thief = generate(tmp_path / "thief", ["adapters-3"], scheme=scheme).public("adapters-3")

    def swap(signed: dict[str, Any]) -> None:
        signed["delegations"]["keys"][keyid]["keyval"] = thief.to_dict()["keyval"]

    edit(request / "after" / "targets.json", swap)
    with pytest.raises(KeyChangeError, match="adapters-3 calls itself"):
        people.sign(request, ["root-1"])


@pytest.mark.parametrize("scheme", ["ed25519", "ecdsa-p256"])
def test_one_key_under_two_identifiers_is_not_a_second_key(tmp_path: Path, scheme: str) -> None:
    keys = generate(tmp_path / "keys", ["adapters-1", "x"], scheme=scheme)
    doc = json.loads((keys.path / "adapters-1.pub.json").read_bytes())
    text = doc["keyval"]["public"]
    other = {"public": text.upper() if scheme == "ed25519" else f"note\n{text}"}
    respelt = compute_default_keyid(doc["keytype"], doc["scheme"], other)
    for changes in (
        {"keyid": NAMELESS},
        {"keyid": respelt, "keyval": other},
        {"keyval": keys.public("x").keyval},
        {"scheme": "ecdsa-sha2-nistp384"},
        {"keyval": {"public": "no key"}},
    ):
        twin = tmp_path / "twin.pub.json"
        twin.write_text(json.dumps({**doc, **changes}))
        with pytest.raises(KeyFileError, match=r"calls itself|not a public key that we use"):
            read_public(twin)


def test_devices_and_servers_count_keys_and_not_their_names(
    publisher: Publisher, device: Device
) -> None:
    """Should root's holders have signed such a list all the same: one key stays one signature."""
    publisher.order(publisher.release(1))
    device.installs()
    (one, *_), files = publisher.adapter_keys, dict(publisher.bundle().files)
    targets = Metadata[Any].from_bytes(files["1.targets.json"])
    twin = targets.signed.delegations.keys[one.public_key.keyid].to_dict()
    doc = targets.to_dict()
    doc["signed"]["version"] = 2
    doc["signed"]["delegations"]["keys"][NAMELESS] = twin
    for role in doc["signed"]["delegations"]["roles"]:
        if role["name"] == "adapters":
            role["keyids"] = [one.public_key.keyid, NAMELESS]
    targets = roles.sign(Metadata[Any].from_dict(doc), publisher.root_keys)
    data, new = payload_of(2), statement(2)
    signed = Metadata[Any].from_bytes(publisher.signed_adapters(new, data, signers=[one]))
    (good,) = signed.signatures.values()
    signed.signatures[NAMELESS] = Signature(NAMELESS, good.signature)
    forged = publisher.forged(targets=targets, adapters=signed)
    refused = device.refuses(forged)
    assert refused.reason is RejectReason.METADATA_SIGNATURE
    assert "1/2 keys" in refused.detail
    with pytest.raises(RepositoryError, match="1/2 keys"):
        verify(targets.signed, "adapters", signed, "adapters.json")


def test_a_change_that_starts_from_files_of_the_thiefs_own(
    publisher: Publisher, people: Ceremony, tmp_path: Path
) -> None:
    """It says nothing but "every year", and would make the thief's key a root of its own."""
    published = publisher.repository.offline()
    thief, third = generate(tmp_path / "thief", ["root-3"]), publisher.keys.public("root-3").keyid
    root, targets = (Metadata[Any].from_bytes(published[name]) for name in ("root", "targets"))
    for name in ("root", "targets"):
        root.signed.revoke_key(third, name)
        root.signed.add_key(thief.public("root-3"), name)
        root.signed.roles[name].threshold = 1
    for metadata in (root, targets):
        metadata.sign(thief.signer("root-3"))
    forged = {**published, "root": roles.to_bytes(root), "targets": roles.to_bytes(targets)}
    request = make_change(
        tmp_path / "change",
        published=forged,
        change=KeyChange(renew=True),
        why="every year",
        now=publisher.now,
    )
    assert not any("root-3" in line for line in request.lines())
    for roots in ((), [publisher.repository.root()]):
        with pytest.raises(AnchorError, match=r"has not signed before/root|not the root 1"):
            sign_change(request.folder, people.known["root-1"], roots=roots)
    # Holders of adapter keys would sign a list of releases that nobody has looked at.
    evil = Metadata[Any].from_bytes(published["adapters"])
    target = roles.release_target(statement(1), 5, hashlib.sha256(b"evil!").hexdigest())
    evil.signed.targets[target.path] = target
    (request.folder / "before" / "adapters.json").write_bytes(roles.to_bytes(evil))
    after = Metadata[Any].from_bytes((request.folder / "after" / "adapters.json").read_bytes())
    after.signed.targets[target.path] = target
    (request.folder / "after" / "adapters.json").write_bytes(roles.to_bytes(after))
    with pytest.raises((AnchorError, KeyChangeError), match=r"has not signed|does not start"):
        sign_change(request.folder, people.known["adapters-1"])


def test_a_release_that_brings_another_along(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    """In the list that it starts from lies one that was never published: both would be signed."""
    data = b"evil!"
    entry = roles.release_target(statement(1), len(data), hashlib.sha256(data).hexdigest())
    honest = publisher.repository.adapters()
    forged = Metadata[Any].from_bytes(honest)
    forged.signed.targets[entry.path] = entry
    request = release.make_request(
        folder,
        tmp_path / "r",
        adapters=roles.to_bytes(forged),
        above=publisher.repository.offline(),
        options=release.ReleaseOptions(channel="stable"),
        now=publisher.now,
    )
    assert request.name == "stable-2"
    for roots, message in (
        ([], "has not signed previous.json"),
        ([publisher.repository.root()], "signed by none of its roles"),
    ):
        with pytest.raises(AnchorError, match=message):
            release.sign(request.folder, publisher.adapter_keys[0], roots=roots)


def _far(signed: dict[str, Any]) -> None:
    signed["expires"] = "9000-01-01T00:00:00Z"


def _online_speaks_for_adapters(signed: dict[str, Any]) -> None:
    for role in signed["delegations"]["roles"]:
        if role["name"] == "rounds":
            role["paths"] = ["adapters/*/*"]


def _another_order(signed: dict[str, Any]) -> None:
    signed["delegations"]["roles"].reverse()


def _not_terminating(signed: dict[str, Any]) -> None:
    signed["delegations"]["roles"][0]["terminating"] = False


def _one_signs_targets(signed: dict[str, Any]) -> None:
    signed["roles"]["targets"]["threshold"] = 1


def _bans_a_stranger(signed: dict[str, Any]) -> None:
    signed["x-airpeft-revoked-keys"] = [NAMELESS]


def _delegates(signed: dict[str, Any]) -> None:
    signed["delegations"] = {"keys": {}, "roles": []}


def _no_date(signed: dict[str, Any]) -> None:
    del signed["x-airpeft-signed-unix"]


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("root", _far, "believed until 9000"),
        ("targets", _far, "believed until 9000"),
        ("adapters", _far, "believed until 9000"),
        ("root", _no_date, "does not say when"),
        ("root", lambda signed: signed.update(x="y"), "does not know: x"),
        ("root", _one_signs_targets, "as many of them"),
        ("root", _bans_a_stranger, "nobody has held"),
        ("targets", _online_speaks_for_adapters, "rounds speak for other targets"),
        ("targets", _another_order, "another order"),
        ("targets", _not_terminating, "speak for other targets"),
        ("adapters", _delegates, "delegates"),
    ],
)
def test_a_change_of_keys_that_hides_another(
    people: Ceremony, role: str, change: Any, message: str
) -> None:
    request = people.request(KeyChange(renew=True))
    edit(request / "after" / f"{role}.json", change)
    with pytest.raises(KeyChangeError, match=message):
        sign_change(request, people.known["root-1"])


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("../../authority/ca", "adapters/acme/*", "no channel"),
        ("adapters-acme", "rounds/*", "no channel"),
        ("adapters-acme", "adapters/*/1.airpeft", "no channel"),
        ("adapters-acme", "adapters/*/*", "has releases that adapters has signed"),
        ("adapters-acme", "adapters/stable/*", "has releases that adapters has signed"),
    ],
)
def test_a_new_role_that_is_more_than_a_tenants(
    publisher: Publisher, people: Ceremony, name: str, path: str, message: str
) -> None:
    """Its name becomes the name of a file; what it speaks for is asked before all others."""
    publisher.release(1)
    (key,) = people.make("acme-1")
    change = KeyChange(
        delegate={"adapters-acme": ("acme",)},
        add={"adapters-acme": (key.public_key,)},
        thresholds={"adapters-acme": 1},
    )
    request = people.request(change)

    def rename(signed: dict[str, Any]) -> None:
        signed["delegations"]["roles"][0] |= {"name": name, "paths": [path]}

    edit(request / "after" / "targets.json", rename)
    files = {path.stem: path.read_bytes() for path in (request / "after").glob("*.json")}
    files[name] = files.pop("adapters-acme")
    before = Offline.parse(publisher.repository.offline())
    with pytest.raises(KeyChangeError, match=message):
        check_change(before, Offline.parse(files))


# Releases


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_far, "believed until 9000"),
        (_delegates, "delegates"),
        (lambda signed: signed.update({"x-later": 1}), "does not know: x-later"),
    ],
)
def test_a_release_that_hides_something_else(
    publisher: Publisher, folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    request = make(publisher, folder, tmp_path / "r")
    edit(request.folder / "adapters.json", change)
    with pytest.raises(ReleaseError, match=message):
        release.sign(request.folder, publisher.adapter_keys[0])


def test_a_release_that_uses_a_channels_numbers_up(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    """The highest number there is would be the last release of its channel."""
    request = make(publisher, folder, tmp_path / "r")

    def run_up(signed: dict[str, Any]) -> None:
        entry = signed["targets"].pop("adapters/stable/1.airpeft")
        entry["custom"]["counter"] = 2**53 - 1
        signed["targets"][f"adapters/stable/{2**53 - 1}.airpeft"] = entry

    edit(request.folder / "adapters.json", run_up)
    with pytest.raises(ReleaseError, match="leaves out the numbers from 1"):
        release.sign(request.folder, publisher.adapter_keys[0])
    new, data = statement(2_000), payload_of(2_000)
    with pytest.raises(PublishError, match="leaves out the numbers from 1"):
        publisher.repository.publish_release(
            publisher.signed_adapters(new, data), data, now=publisher.now
        )


def test_the_gate_is_asked_by_what_is_published(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    """A request in which the parent is as bad, or is not there, opens no gate."""
    good = evaluation("heldout", 0.9, 400)
    request = make(publisher, folder, tmp_path / "r1", evaluations=(good,))
    for key in publisher.adapter_keys[:2]:
        release.sign(request.folder, key)
    release.publish(request.folder, publisher.repository, now=publisher.now)
    request = make(publisher, folder, tmp_path / "r2", evaluations=(good,))

    def claim_less(signed: dict[str, Any]) -> None:
        for entry in signed["targets"].values():
            entry["custom"]["evaluation"]["accuracy_micro"] = 1

    def without_parent(signed: dict[str, Any]) -> None:
        signed["targets"].pop("adapters/stable/1.airpeft", None)

    signed: list[Metadata[Any]] = []
    originals = {p.name: p.read_bytes() for p in request.folder.glob("*.json")}
    for lie, message in ((claim_less, "cannot be changed"), (without_parent, "take stable-1 out")):
        for name in ("adapters.json", "previous.json"):
            (request.folder / name).write_bytes(originals[name])
            edit(request.folder / name, lie)
        with pytest.raises(AnchorError, match=r"has not signed previous\.json"):
            release.sign(request.folder, publisher.adapter_keys[0])
        edit(request.folder / "adapters.json", claim_less)
        for key in publisher.adapter_keys[:2]:  # those who sign whatever they are given
            parsed = release.read_request(request.folder).parsed
            signature = key.sign(parsed.signed_bytes)
            parsed.signatures[signature.keyid] = signature
            signed.append(parsed)
        signed[-1].signatures |= signed[-2].signatures
        data = (request.folder / "payload.airpeft").read_bytes()
        with pytest.raises(PublishError, match=message):
            publisher.repository.publish_release(
                roles.to_bytes(signed[-1]), data, now=publisher.now
            )


def test_a_worse_release_is_not_published_without_a_signed_reason(publisher: Publisher) -> None:
    measured, worse = (evaluation("heldout", value, 400) for value in (0.9, 0.5))
    publisher.release(1, evaluation=measured)
    with pytest.raises(PublishError, match=r"0\.9000 on heldout"):
        publisher.release(2, evaluation=worse)
    record = publisher.release(2, evaluation=worse, forced="forgets a leaked name")
    assert record.statement.forced


def test_a_revocation_with_a_floor_above_everything(publisher: Publisher, tmp_path: Path) -> None:
    record = publisher.release(1)
    request = make_revocation(
        tmp_path / "bad",
        adapters=publisher.repository.adapters(),
        release="stable-1",
        why="leaks",
        now=publisher.now,
    )
    path = request.folder / "adapters.json"
    for floor, good in ((2, True), (3, False), (2**53 - 1, False)):
        edit(path, lambda signed, n=floor: signed["x-airpeft-standing"]["floors"].update(stable=n))
        if good:
            release.read_revocation(request.folder)
            continue
        with pytest.raises(ReleaseError, match="above every release"):
            release.sign(request.folder, publisher.adapter_keys[0])
        signed = roles.sign(Metadata[Any].from_file(str(path)), publisher.adapter_keys[:2])
        with pytest.raises(PublishError, match="above every release"):
            publisher.repository.publish_standing(roles.to_bytes(signed), now=publisher.now)
    assert hashlib.sha256(payload_of(1)).hexdigest() == record.sha256


# Files


@pytest.mark.parametrize("name", ["adapters.json", "previous.json", "payload.airpeft"])
def test_a_pipe_or_a_giant_in_a_request_holds_nobody(
    publisher: Publisher, folder: Path, tmp_path: Path, name: str
) -> None:
    request = make(publisher, folder, tmp_path / "r")
    path = request.folder / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ReleaseError, match="not an ordinary file"):
        release.sign(request.folder, publisher.adapter_keys[0])
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ReleaseError, match="more than"):
        release.sign(request.folder, publisher.adapter_keys[0])


def test_nests_and_absurd_dates_are_said_and_end_nothing(
    publisher: Publisher, people: Ceremony, tmp_path: Path
) -> None:
    request = people.request(KeyChange(renew=True))
    (request / "request.json").write_text("[" * 200_000)
    with pytest.raises(KeyChangeError, match="not a request"):
        sign_change(request, people.known["root-1"])
    nest = tmp_path / "nest.pub.json"
    for text in ("[" * 60_000, "[" * 200_000):
        nest.write_text(text)
        with pytest.raises(KeyFileError, match=r"not a public key|more than"):
            read_public(nest)
    publisher.release(1, made_unix=2**53 - 1)
    where = publisher.repository.folder
    path = where / "metadata" / "timestamp.json"
    stolen = Metadata[Any].from_file(str(path))
    stolen.signed.unrecognized_fields["x-airpeft-signed-unix"] = 10**18
    stolen.sign(publisher.online)
    path.write_bytes(roles.to_bytes(stolen))
    report = verify_repository(where, publisher.repository.root(), now=publisher.now)
    assert [r.made for r in report.roles if r.role == "timestamp"] == [None]
    (known,) = report.releases
    assert day(known.record.statement.made_unix).endswith("seconds after 1970")
    assert (known.payload, report.sound) == ("good", True)


def test_what_is_signed_is_what_was_read_and_shown(
    publisher: Publisher, people: Ceremony, folder: Path, tmp_path: Path
) -> None:
    """On a stick or a share, somebody may exchange a request while a person looks at it."""
    shown, other = (people.request(KeyChange(renew=True, thresholds=t)) for t in ({}, {"root": 3}))
    waiting = read_change(shown)
    shutil.rmtree(shown)
    other.rename(shown)
    signature = sign_change(waiting, people.known["root-1"], out=tmp_path / "s.json")
    assert json.loads(signature.read_bytes())["signs_sha256"] == waiting.digest
    assert read_change(shown).digest != waiting.digest
    # A list that was never published is not exchanged for the published one after it was compared.
    request = make(publisher, folder, tmp_path / "r")
    honest = (request.folder / "previous.json").read_bytes()
    edit(request.folder / "previous.json", lambda signed: signed.update(expires=_SOON))
    read = release.read_request(request.folder)
    (request.folder / "previous.json").write_bytes(honest)
    with pytest.raises(AnchorError, match="has not signed"):
        release.sign_request(read, publisher.adapter_keys[0])
    assert release.sign(request.folder, publisher.adapter_keys[0]).is_file()


_SOON = "2026-06-01T00:00:00Z"
