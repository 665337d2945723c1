"""Revoked releases and the gate before signing, from the request to what a device does."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from aggregation import peft_layout
from federation import release, roles
from federation.description import ReleaseError
from federation.model_signing import PREDICATE, BundleError, bundle_digest, resources
from federation.provenance import (
    ProvenanceError,
    evaluation,
    fingerprint,
    read_evaluations,
    read_provenance,
)
from federation.published import PublishError, ReleaseRecord
from federation.repository import Repository
from federation.verification import verify_repository
from protos.messages import RejectReason
from protos.signed import Hardware, Revocation, Standing, StatementError
from tests.trust.fleet_of_one import START, Device, Publisher, payload_of, statement
from tests.trust.test_release import adapter, folder, make

__all__ = ["adapter", "folder"]  # fixtures
R = RejectReason


def revoke(publisher: Publisher, out: Path, name: str, **changes: Any) -> Path:
    """A signed request."""
    fields = {"why": "answers with names", "now": publisher.now, **changes}
    channel = name.rpartition("-")[0]
    adapters = publisher.repository.adapters(channel)
    above = publisher.repository.offline()
    release.make_revocation(out, adapters=adapters, release=name, above=above, **fields)
    for key in publisher.adapter_keys[:2]:
        release.sign(out, key, roots=[publisher.repository.root()])
    return out


def publish(publisher: Publisher, request: Path) -> tuple[Revocation, ...]:
    signed = release.assemble_revocation(request)
    return publisher.repository.publish_standing(signed, now=publisher.now)


@pytest.fixture
def two(publisher: Publisher, device: Device) -> tuple[ReleaseRecord, ReleaseRecord]:
    """Two releases; the device runs the second."""
    records = publisher.release(1), publisher.release(2)
    publisher.order(records[1])
    assert device.installs().name == "stable-2"
    return records


def test_no_device_installs_a_revoked_release(
    publisher: Publisher, device: Device, two: Any, tmp_path: Path
) -> None:
    before = publisher.bundle()
    (entry,) = publish(publisher, revoke(publisher, tmp_path / "bad", "stable-2"))
    assert (entry.release, entry.why) == ("stable-2", "answers with names")
    refused = device.refuses()
    assert refused.reason is R.KNOWN_BAD
    assert "answers with names" in refused.detail
    assert device.trust.revoked(two[1].sha256) == "stable-2: answers with names"
    device.restart()
    assert device.trust.revoked(two[1].sha256), "it lasts"
    assert device.trust.revoked(two[0].sha256) is None
    # A device that was away hears of both at once; one that hears the old news only does not.
    fresh = Device(tmp_path / "fresh", publisher)
    assert fresh.reason() is R.KNOWN_BAD
    away = Device(tmp_path / "away", publisher)
    assert away.installs(before).name == "stable-2"
    publisher.order(two[0])
    assert device.installs().name == "stable-1"
    with pytest.raises(PublishError, match="is revoked"):
        publisher.repository.check_orderable(two[1])


def test_a_revocation_is_never_taken_back(
    publisher: Publisher, device: Device, two: Any, tmp_path: Path
) -> None:
    publish(publisher, revoke(publisher, tmp_path / "bad", "stable-2"))
    device.refuses()
    # Two stolen adapter keys and the online key: a file that no longer says so.
    current = Metadata[Any].from_bytes(publisher.repository.adapters()).signed
    silent = roles.adapters(current.targets.values(), current.version + 1, publisher.now)
    forged = roles.sign(silent, publisher.adapter_keys[:2])
    assert device.reason(publisher.forged(adapters=forged)) is R.KNOWN_BAD
    with pytest.raises(PublishError, match="stays revoked"):
        publisher.repository.publish_standing(roles.to_bytes(forged), now=publisher.now)
    data = payload_of(3)
    signed = publisher.signed_adapters(statement(3), data, standing=Standing())
    with pytest.raises(PublishError, match="stays revoked"):
        publisher.repository.publish_release(signed, data, now=publisher.now)


def test_a_revocation_can_raise_the_floor(
    publisher: Publisher, device: Device, two: Any, tmp_path: Path
) -> None:
    request = revoke(publisher, tmp_path / "bad", "stable-2", also_older=True)
    assert release.read_revocation(request).floors == {"stable": 3}
    publish(publisher, request)
    publisher.order(two[0])
    assert device.reason() is R.DOWNGRADE
    assert device.trust.state.floors == {"stable": 3}
    with pytest.raises(PublishError, match="below the signed floor 3"):
        publisher.repository.check_orderable(two[0])


def test_releases_go_on_after_a_revocation(
    publisher: Publisher, device: Device, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    peft_layout.write(other, adapter(1), base_name="tiny")
    for number, source in ((1, folder), (2, other)):
        request = make(publisher, source, tmp_path / f"r{number}", force_worse="not measured")
        for key in publisher.adapter_keys[1:]:
            release.sign(request.folder, key, roots=[publisher.repository.root()])
        release.publish(request.folder, publisher.repository, now=START)
        if number == 1:
            bad = revoke(publisher, tmp_path / "bad", "stable-1", also_older=True)
            publish(publisher, bad)
            with pytest.raises(ReleaseError, match="these very bytes are revoked"):
                make(publisher, folder, tmp_path / "same")
    record = publisher.repository.release("stable-2")
    publisher.order(record)
    assert device.installs().name == "stable-2"
    report = verify_repository(publisher.repository.folder, publisher.repository.root(), now=START)
    (first, second) = report.releases
    assert (first.revoked, second.revoked) == ("answers with names", "")
    assert second.signed_by == ("adapters-2", "adapters-3")


def test_doing_it_again_changes_nothing(publisher: Publisher, two: Any, tmp_path: Path) -> None:
    request = revoke(publisher, tmp_path / "bad", "stable-2")
    publish(publisher, request)
    before = publisher.bundle()
    assert publish(publisher, request) == ()
    assert publisher.bundle() == before
    with pytest.raises(ReleaseError, match="revoked already"):
        revoke(publisher, tmp_path / "again", "stable-2")


def test_who_signs_a_revocation(publisher: Publisher, two: Any, tmp_path: Path) -> None:
    out = tmp_path / "bad"
    release.make_revocation(
        out,
        adapters=publisher.repository.adapters(),
        release="stable-1",
        why="x",
        now=publisher.now,
        above=publisher.repository.offline(),
    )
    release.sign(out, publisher.adapter_keys[0])
    release.sign(out, publisher.online, roots=[publisher.repository.root()])
    assert release.signed_so_far(out) == ["adapters-1", "online"]
    with pytest.raises(PublishError, match="1/2"):
        publish(publisher, out)


@pytest.mark.parametrize("what", ["release", "nothing", "taken back", "version"])
def test_a_request_that_says_something_else(
    publisher: Publisher, two: Any, tmp_path: Path, what: str
) -> None:
    request = revoke(publisher, tmp_path / "bad", "stable-2")
    path = request / "adapters.json"
    doc = json.loads(path.read_bytes())
    if what == "release":
        doc["signed"]["targets"].popitem()
    elif what == "nothing":
        del doc["signed"]["x-airpeft-standing"]
    elif what == "taken back":
        before = json.loads((request / "previous.json").read_bytes())
        before["signed"]["x-airpeft-standing"] = {"revoked": [], "floors": {"stable": 9}}
        (request / "previous.json").write_text(json.dumps(before))
    else:
        doc["signed"]["version"] += 1
    path.write_text(json.dumps(doc))
    with pytest.raises(ReleaseError):
        release.sign(request, publisher.adapter_keys[0])


def test_a_release_and_a_revocation_in_one_are_refused(
    publisher: Publisher, two: Any, folder: Path, tmp_path: Path
) -> None:
    data, new = payload_of(3), statement(3)
    current = Metadata[Any].from_bytes(publisher.repository.adapters()).signed
    said = Standing(revoked=(Revocation(release="stable-1", sha256=two[0].sha256, why="x"),))
    target = roles.release_target(new, len(data), hashlib.sha256(data).hexdigest())
    listed = [*current.targets.values(), target]
    both = roles.adapters(listed, current.version + 1, publisher.now, said)
    signed = roles.to_bytes(roles.sign(both, publisher.adapter_keys[:2]))
    with pytest.raises(PublishError, match="one after the other"):
        publisher.repository.publish_release(signed, data, now=publisher.now)
    with pytest.raises(PublishError, match="one after the other"):
        publisher.repository.publish_standing(signed, now=publisher.now)
    request = make(publisher, folder, tmp_path / "r")
    doc = json.loads((request.folder / "adapters.json").read_bytes())
    doc["signed"]["x-airpeft-standing"] = said.to_field()
    (request.folder / "adapters.json").write_text(json.dumps(doc))
    with pytest.raises(ReleaseError, match="revokes no other"):
        release.sign(request.folder, publisher.adapter_keys[0])


@pytest.mark.parametrize(
    "field",
    [
        [],
        {"revoked": {}},
        {"revoked": [7]},
        {"revoked": [{"release": "stable-1", "sha256": "x", "why": ""}]},
        {"revoked": [{"release": "stable", "sha256": "ab" * 32, "why": ""}]},
        {"floors": {"stable": "3"}},
        {"floors": {"..": 3}},
        {"floors": {f"c{n}": 1 for n in range(1_000)}},
    ],
)
def test_a_standing_that_is_none_is_refused_by_devices(
    publisher: Publisher, device: Device, two: Any, field: Any
) -> None:
    current = Metadata[Any].from_bytes(publisher.repository.adapters())
    current.signed.version += 1
    current.signed.unrecognized_fields["x-airpeft-standing"] = field
    current.signatures.clear()
    forged = roles.sign(current, publisher.adapter_keys[:2])
    assert device.reason(publisher.forged(adapters=forged)) is R.METADATA_MALFORMED
    with pytest.raises(StatementError):
        Standing.from_field(field)


def test_a_repository_with_revocations_is_read_again(
    publisher: Publisher, two: Any, tmp_path: Path
) -> None:
    publish(publisher, revoke(publisher, tmp_path / "bad", "stable-1", also_older=True))
    again = Repository(publisher.repository.folder, publisher.online)
    assert again.standing()["adapters"].floors == {"stable": 2}
    assert [r.name for r in again.releases()] == ["stable-1", "stable-2"]


# The gate


def released(publisher: Publisher, folder: Path, out: Path, **options: Any) -> ReleaseRecord:
    request = make(publisher, folder, out, **options)
    for key in publisher.adapter_keys[:2]:
        release.sign(request.folder, key)
    return release.publish(request.folder, publisher.repository, now=START)


def test_a_release_that_is_worse_than_its_parent(
    publisher: Publisher, device: Device, folder: Path, tmp_path: Path
) -> None:
    hard = evaluation("hard", 0.61, 200)
    one = released(publisher, folder, tmp_path / "r1", evaluations=(hard,))
    assert {e.set for e in one.statement.evaluations} == {"heldout", "hard"}
    for options, message in (
        ({}, "stable-1 has 0.6100 on hard, where this one was not measured"),
        ({"evaluations": (evaluation("hard", 0.6099, 200),)}, "this one 0.6099"),
        ({"evaluations": (hard, evaluation("heldout", 0.5, 400))}, r"0\.8425 on heldout"),
    ):
        with pytest.raises(ReleaseError, match=message):
            make(publisher, folder, tmp_path / "worse", **options)
    worse = (hard, evaluation("heldout", 0.5, 400))
    with pytest.raises(ReleaseError, match="say why"):
        make(publisher, folder, tmp_path / "worse", evaluations=worse, force_worse="  ")
    forced = released(
        publisher, folder, tmp_path / "r2", evaluations=worse, force_worse="forgets a leaked name"
    )
    publisher.order(forced)
    assert device.installs().statement.forced == "forgets a leaked name"
    # The next one is compared with that one; what is good enough needs no reason and gets none.
    better = released(
        publisher, folder, tmp_path / "r3", evaluations=(hard,), force_worse="not needed"
    )
    assert better.statement.forced == ""


def test_a_signer_asks_the_gate_himself(publisher: Publisher, folder: Path, tmp_path: Path) -> None:
    released(publisher, folder, tmp_path / "r1")
    request = make(publisher, folder, tmp_path / "r2", force_worse="")
    path = request.folder / "adapters.json"
    doc = json.loads(path.read_bytes())
    new = doc["signed"]["targets"]["adapters/stable/2.airpeft"]
    new["custom"]["evaluation"]["accuracy_micro"] = 1
    path.write_text(json.dumps(doc))
    with pytest.raises(ReleaseError, match="worse than its parent"):
        release.sign(request.folder, publisher.adapter_keys[0])


def test_what_is_revoked_is_nobodys_measure(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    released(publisher, folder, tmp_path / "r1", evaluations=(evaluation("heldout", 0.7, 400),))
    released(publisher, folder, tmp_path / "r2", evaluations=(evaluation("heldout", 1.0, 400),))
    publish(publisher, revoke(publisher, tmp_path / "bad", "stable-2", why="trained on the test"))
    third = evaluation("heldout", 0.8, 400)
    released(publisher, folder, tmp_path / "r3", evaluations=(third,), dtype="int8")


def test_evaluations_from_a_file(tmp_path: Path, folder: Path) -> None:
    path = folder / "evaluation.json"
    path.write_text(
        json.dumps(
            {
                "evaluations": [
                    {"set": "heldout", "accuracy": 0.9, "examples": 100},
                    {"set": "hard", "accuracy": 1, "examples": 7},
                ]
            }
        )
    )
    found = {e.set: e.accuracy_micro for e in read_provenance(folder).evaluations}
    assert found == {"heldout": 900_000, "hard": 1_000_000}
    for bad in (
        {"evaluations": {}},
        {"evaluations": [7]},
        {"evaluations": [{"set": "", "accuracy": 0.5, "examples": 1}]},
        {"evaluations": [{"set": "x", "accuracy": True, "examples": 1}]},
        {"evaluations": [{"set": "x", "accuracy": 2, "examples": 1}]},
        {"evaluations": [{"set": "x", "accuracy": 0.5, "examples": "1"}]},
        {"evaluations": [{"set": "x", "accuracy": 0.5, "examples": 1}] * 2},
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ProvenanceError):
            read_evaluations(path)


# Provenance and needs


def bundle(path: Path, tensors: bytes, **changes: Any) -> Path:
    """A model-signing bundle in form; nobody here checks its signature."""
    digest = hashlib.sha256(tensors)
    whole = hashlib.sha256(digest.digest()).hexdigest()
    said = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "adapter", "digest": {"sha256": whole}}],
        "predicateType": f"{PREDICATE}signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256"},
            "resources": [
                {
                    "name": "adapter_model.safetensors",
                    "algorithm": "sha256",
                    "digest": digest.hexdigest(),
                }
            ],
        },
        **changes,
    }
    envelope = {
        "payload": base64.b64encode(json.dumps(said).encode()).decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": "MEUCIQ=="}],
    }
    path.write_text(
        json.dumps(
            {"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": envelope}
        )
    )
    return path


def test_a_model_signing_bundle_for_this_very_adapter(
    publisher: Publisher, device: Device, folder: Path, tmp_path: Path
) -> None:
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    path = bundle(tmp_path / "model.sig", tensors)
    digest = bundle_digest(path, folder)
    assert digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    publisher.order(released(publisher, folder, tmp_path / "r1", model_signing=digest))
    assert device.installs().statement.model_signing == digest
    with pytest.raises(BundleError, match="another adapter_model"):
        bundle_digest(bundle(tmp_path / "other.sig", b"other"), folder)
    for text in ("", "[]", "{}", '{"dsseEnvelope": {"payloadType": "x", "signatures": []}}'):
        with pytest.raises(BundleError):
            resources(text.encode())
    path = bundle(tmp_path / "wrong.sig", tensors, predicateType="https://slsa.dev/provenance/v1")
    with pytest.raises(BundleError, match="predicateType"):
        bundle_digest(path, folder)
    with pytest.raises(BundleError, match="cannot read"):
        bundle_digest(tmp_path / "nothing", folder)


def test_fingerprints_of_training_data(publisher: Publisher, folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    digest = fingerprint(str(rows))
    assert digest == "sha256:" + hashlib.sha256(b"{}\n").hexdigest()
    assert fingerprint(digest) == digest
    record = released(publisher, folder, tmp_path / "r1", data=(digest, digest))
    assert record.statement.lineage.data == (digest,)
    assert record.statement.lineage.run == "demo", "what the folder says stays"
    with pytest.raises(ProvenanceError, match="cannot read"):
        fingerprint(str(tmp_path / "nothing"))
    with pytest.raises(ReleaseError, match="fingerprints"):
        make(publisher, folder, tmp_path / "r2", data=("sha256:short",))


@pytest.mark.parametrize(
    ("hardware", "facts", "good"),
    [
        (Hardware(machines=("aarch64",)), {"machine": "x86_64"}, False),
        (Hardware(machines=("aarch64", "x86_64")), {"machine": "x86_64"}, True),
        (Hardware(machines=("aarch64",)), {}, False),
        (Hardware(memory_mib=512), {"memory_mib": 511}, False),
        (Hardware(memory_mib=512), {"memory_mib": 512}, True),
        (Hardware(memory_mib=512), {}, False),
        (Hardware(), {}, True),
    ],
)
def test_what_a_machine_must_have(
    publisher: Publisher, tmp_path: Path, hardware: Hardware, facts: dict[str, Any], good: bool
) -> None:
    publisher.order(publisher.release(1, hardware=hardware))
    device = Device(tmp_path / "d", publisher, **facts)
    if good:
        assert device.installs().name == "stable-1"
        return
    refused = device.refuses()
    assert refused.reason is R.UNSUPPORTED_RUNTIME
    assert "needs" in refused.detail


def test_an_agent_of_before_refuses_what_it_does_not_know() -> None:
    """Hardware is critical: whoever does not know the field must not install."""
    custom = statement(1, hardware=Hardware(memory_mib=1)).to_custom()
    assert custom["critical"] == ["hardware"]
    assert "critical" not in statement(1).to_custom()


def test_a_copy_of_the_request_is_enough_for_the_signer(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    publisher.release(1)
    request = revoke(publisher, tmp_path / "bad", "stable-1")
    shutil.rmtree(request / "signatures")
    there = shutil.copytree(request, tmp_path / "there")
    files = [
        release.sign(there, key, out=tmp_path / f"{number}.json")
        for number, key in enumerate(publisher.adapter_keys[:2])
    ]
    signed = release.assemble_revocation(request, files)
    assert publisher.repository.publish_standing(signed, now=publisher.now)
