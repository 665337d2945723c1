"""Encrypted releases: who can read them, who cannot, and what happens to those who try."""

from __future__ import annotations

import hmac
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from aggregation import payload, sealed
from aggregation.durable import StorageError
from aggregation.sealed import CHUNK, HEAD, TAG
from clients import identity
from clients.connection import Connection, Denied
from clients.content_keys import ContentKeys
from clients.inspection import Refusal
from clients.link import Backoff
from clients.renewal import Keeper
from clients.slots import SlotRecord, Slots
from clients.sources import open_sources
from clients.trust import SignedRelease
from federation import chunks, release
from federation.authority import spki
from federation.enrolment import EnrolmentError
from federation.mirror import FolderShelf, export_mirror
from federation.published import PublishError
from federation.readers import ReaderError, active_certificates, barred_keys, read_readers
from federation.release_request import WRAPS
from federation.sealing import SealingError, load_sealing_key, make_sealing_key
from federation.wrap_shelf import WrapShelf, WrapShelfError
from protos.messages import DeviceEvent, EnrolRequest, RejectReason
from protos.recipients import RecipientError, encryption_key, extension, private_key
from protos.signed import ReleaseStatement, StatementError
from protos.wraps import WRAPPED, WrapError, Wraps, tag_of, unwrap, wrap, wraps_path
from simulations.light_device import light_adapter
from tests.delivery.mirrors import serving
from tests.delivery.rig import ROOT, new_key
from tests.delivery.secret_fleet import SecretFleet, is_there, public_of, running, serves
from tests.waiting import until

KEY, SHA = bytes(range(32)), "ab" * 32


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SecretFleet]:
    made = SecretFleet(tmp_path / "fleet")
    yield made
    made.gateway.close()


# --- who can read ---------------------------------------------------------------------------------


def test_an_enrolled_device_installs_it_and_opens_it_again_after_a_restart(
    fleet: SecretFleet,
) -> None:
    home = fleet.enrol("kitchen")
    record = fleet.publish()
    assert record.length == sealed.sealed_length(fleet.plain.length) > 2 * CHUNK
    with running(home) as runtime:
        assert serves(runtime, "stable-1")
        assert runtime.pin().digest == fleet.plain.adapter_digest
        said = fleet.gateway.reports
        until(
            lambda: DeviceEvent.COMMITTED in [report.event for report in said("kitchen")],
            what="the report of the commit",
        )
    needle = fleet.plain.data[100:160]
    assert not is_there(home, needle), "at rest it stays as it was sent"
    assert not is_there(fleet.folder / "server", needle), "the server never had it"
    assert not is_there(fleet.folder / "request-1", needle)
    fleet.gateway.stop()
    with running(home) as runtime:
        assert serves(runtime, "stable-1")


def test_a_device_without_a_key_is_refused_until_it_is_wrapped_to_it(fleet: SecretFleet) -> None:
    fleet.enrol("early")
    record = fleet.publish()
    late = fleet.enrol("late")
    with running(late) as runtime:
        assert fleet.refusal("late", "stable-1") is RejectReason.CONTENT_KEY
        assert runtime.pin().name == "base"
        assert not (late / "slots" / "partial").exists(), "it does not fetch what it cannot read"
        assert fleet.wrap(record) == 1
        assert serves(runtime, "stable-1")
    assert fleet.wrap(record) == 0, "again, and nothing changes"


def test_a_device_of_an_older_agent_brings_its_key_by_itself(fleet: SecretFleet) -> None:
    home = fleet.enrol("old", encryption=False)
    record = fleet.publish()
    assert fleet.readers() == {}
    identity.encryption_key_of(home)  # what a new agent does at its start
    who = identity.load(home)
    assert not who.is_reader
    connection = Connection(who)
    with pytest.raises(Denied, match="names no encryption key"):
        connection.content_key(record.sha256)
    connection.close()
    keeper = Keeper(
        home,
        who,
        now=lambda: datetime.now(UTC),
        backoff=Backoff(random.Random(1), base=0.01),  # noqa: S311
    )
    assert not keeper.is_due()
    keys = ContentKeys(who.encryption_pem, lacking=keeper.ask_for_reader)
    with pytest.raises(Refusal, match="no source has its key"):
        keys.keyed(_slot_record(record), None, [])
    assert keeper.is_due(), "it does not wait for the end of its certificate"
    assert keeper.renew()
    assert keeper.who.is_reader
    assert not keeper.is_due()
    assert fleet.readers() == {"old": public_of(home)}
    assert fleet.wrap(record) == 1
    with running(home) as runtime:
        assert serves(runtime, "stable-1")


def test_a_revoked_device_gets_no_key_and_can_open_nothing(
    fleet: SecretFleet, tmp_path: Path
) -> None:
    kitchen, stolen = fleet.enrol("kitchen"), fleet.enrol("stolen")
    first = fleet.publish(1)
    assert fleet.shelf.find(first.sha256, public_of(stolen))
    fleet.revoke("stolen")
    assert fleet.shelf.find(first.sha256, public_of(stolen)) is None
    assert fleet.shelf.find(first.sha256, public_of(kitchen))
    second = fleet.publish(2)
    assert fleet.wrap(second) == 0
    held = Wraps.from_bytes((fleet.folder / "request-2" / WRAPS).read_bytes(), second.sha256)
    assert held.find(public_of(stolen)) is None
    smuggled = held.merged(Wraps.to(KEY, second.sha256, [public_of(stolen)]))
    assert fleet.shelf.add(smuggled, barred_keys(fleet.gateway.store)) == 0
    connection = Connection(identity.load(stolen))
    with pytest.raises(Denied, match="permission-denied"):
        connection.content_key(second.sha256)
    connection.close()
    private = X25519PrivateKey.generate()  # stands for whatever key it has, none of these is its
    for entries in (held, fleet.shelf.get(second.sha256)):
        for wrapped in entries.entries.values():
            for key in (private, _private(stolen)):
                with pytest.raises(WrapError):
                    unwrap(wrapped, key, second.sha256)
    export_mirror(fleet.repository.folder, tmp_path / "stick")
    with running(stolen, open_sources([str(tmp_path / "stick")], seconds=0.05)) as runtime:
        reports = stolen / "telemetry"
        until(lambda: any(reports.glob("*.report")), what="a report in the queue")
        until(
            lambda: any(b"encrypted" in f.read_bytes() for f in reports.glob("*.report")),
            what="the refusal in the queue",
        )
        assert runtime.pin().name == "base"


# --- mirrors and sticks ---------------------------------------------------------------------------


def test_a_mirror_holds_nothing_readable_and_a_device_installs_from_it(
    fleet: SecretFleet, tmp_path: Path
) -> None:
    home, record = fleet.enrol("kitchen"), fleet.publish()
    fleet.gateway.stop()
    stick = tmp_path / "stick"
    done = export_mirror(fleet.repository.folder, stick)
    assert (stick / wraps_path(record.sha256)).is_file()
    assert export_mirror(stick, tmp_path / "again").files == done.files
    body = fleet.plain.data
    for at in range(0, len(body) - 64, 5000):
        assert not is_there(stick, body[at : at + 32])
    with serving(FolderShelf(stick)) as server:
        sources = open_sources([f"http://127.0.0.1:{server.port}"], seconds=0.05)
        with running(home, sources) as runtime:
            assert serves(runtime, "stable-1")


def test_a_mirror_that_lies_about_keys_is_passed_over(fleet: SecretFleet, tmp_path: Path) -> None:
    home, record = fleet.enrol("kitchen"), fleet.publish()
    public, path = public_of(home), wraps_path(record.sha256)
    export_mirror(fleet.repository.folder, tmp_path / "honest")
    wrong = {
        "junk": b"junk",
        "another's": Wraps.to(KEY, record.sha256, [bytes(range(32))]).to_bytes(),
        "another key": Wraps.to(KEY, record.sha256, [public]).to_bytes(),
        "another payload": Wraps.to(KEY, SHA, [public]).to_bytes(),
        "none": None,
    }
    order = []
    for name, data in wrong.items():
        folder = tmp_path / name
        export_mirror(tmp_path / "honest", folder)
        (folder / path).unlink()
        if data is not None:
            (folder / path).write_bytes(data)
        order.append(str(folder))
    sources = open_sources([*order, str(tmp_path / "honest")], seconds=0.05)
    keys = ContentKeys(identity.load(home).encryption_pem)
    plain = _slot_record(record)
    with pytest.raises(Refusal) as refused:
        keys.keyed(plain, None, sources.places(None)[:-1])
    assert refused.value.fields["reason"] is RejectReason.CONTENT_KEY
    assert not refused.value.final
    for word in ("not a file of wrapped keys", "none for this device", "does not open it"):
        assert word in str(refused.value)
    with running(home, sources) as runtime:
        assert serves(runtime, "stable-1")


# --- bytes that are signed and yet wrong ----------------------------------------------------------


def _chunks(data: bytes) -> list[bytes]:
    full = CHUNK + TAG
    return [data[at : at + full] for at in range(len(HEAD), len(data), full)]


def test_chunks_that_were_changed_before_they_were_signed_are_refused(fleet: SecretFleet) -> None:
    home, key = fleet.enrol("kitchen"), sealed.new_key()
    good = sealed.seal(fleet.plain.data, key)
    one, two, *rest = _chunks(good)
    flipped = bytes([two[0] ^ 1]) + two[1:]
    attacks = {
        "tampered": HEAD + one + flipped + b"".join(rest),
        "reordered": HEAD + two + one + b"".join(rest),
        "truncated": HEAD + one + two,
        "extended": good[: -len(rest[-1])] + one + rest[-1],
        "another adapter": sealed.seal(_other_payload(), key),
    }
    with running(home) as runtime:
        for data in attacks.values():
            record = fleet.publish_bytes(data, key, [public_of(home)])
            assert fleet.refusal("kitchen", record.name) is RejectReason.PAYLOAD_MALFORMED
            assert runtime.pin().name == "base"
            assert Slots(home).state.active is None
        honest = fleet.publish_bytes(good, key, [public_of(home)])
        assert serves(runtime, honest.name)
        other = fleet.publish_bytes(sealed.seal(fleet.plain.data, KEY), KEY, [])
        fleet.shelf.add(Wraps.to(key, other.sha256, [public_of(home)]))
        assert fleet.refusal("kitchen", other.name) is RejectReason.CONTENT_KEY


def test_a_seal_that_is_not_said_or_said_in_vain_is_not_published(fleet: SecretFleet) -> None:
    plain, key = fleet.plain.data, KEY
    with pytest.raises(PublishError, match="signed as encrypted"):
        fleet.publish_bytes(plain, key, [])
    with pytest.raises(PublishError, match="signed as plain"):
        fleet.publish_bytes(sealed.seal(plain, key), key, [], seal=None)
    with pytest.raises(PublishError, match="cut short or lengthened"):
        fleet.publish_bytes(sealed.seal(b"", key)[:-1], key, [])


def test_the_carrier_is_to_blame_for_other_bytes_and_not_the_release(fleet: SecretFleet) -> None:
    home, record = fleet.enrol("kitchen"), fleet.publish()
    file = fleet.gateway.payload_file(record)
    data = file.read_bytes()
    one, two, *rest = _chunks(data)
    file.write_bytes(HEAD + two + one + b"".join(rest))
    with running(home) as runtime:
        assert fleet.refusal("kitchen", "stable-1") is RejectReason.PAYLOAD_DIGEST
        file.write_bytes(data)
        assert serves(runtime, "stable-1")


# --- kills ----------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_a_download_it_goes_on_and_nothing_readable_was_left(
    fleet: SecretFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 64 * 1024)
    home, record = fleet.enrol("kitchen"), fleet.publish()
    fleet.gateway.stop()
    fleet.gateway.cut_after, fleet.gateway.hang = 1, True
    fleet.gateway.start()
    home_port(home, fleet.gateway.port)
    part = home / "slots" / "partial" / f"{record.sha256}.part"
    words = [sys.executable, "-m", "simulations.light_device", str(home), "0.05"]
    with subprocess.Popen(words, cwd=ROOT) as device:
        try:
            until(lambda: part.exists() and part.stat().st_size > 0, what="a first part")
        finally:
            device.kill()
    assert 0 < part.stat().st_size < record.length
    assert not is_there(home, fleet.plain.data[100:160])
    fleet.gateway.service.cut_after = None
    with running(home) as runtime:
        assert serves(runtime, "stable-1")
    assert any(path == record.path and at > 0 for path, at in fleet.gateway.fetches)


def home_port(home: Path, port: int) -> None:
    """The gateway has another port after its start: tell the device."""
    file = home / "identity" / "identity.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "fleet": f"127.0.0.1:{port}"}))


def test_wrapped_keys_are_replaced_as_a_whole_wherever_it_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.delivery.wrap_crash", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["keys"] for row in found} == {1, 3}
    assert all(row["whole"] and row["then"] == 3 for row in found), found
    assert len(found) > 3
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        WrapShelf(tmp_path / "file").add(Wraps(SHA, {}))
    with pytest.raises(WrapShelfError, match="cannot read"):
        WrapShelf(tmp_path / "file").get(SHA)


# --- the parts ------------------------------------------------------------------------------------


def test_a_wrapped_key_opens_with_its_key_for_its_payload_alone() -> None:
    mine, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    public = mine.public_key().public_bytes_raw()
    wrapped = wrap(KEY, public, SHA)
    assert len(wrapped) == WRAPPED == 80
    assert unwrap(wrapped, mine, SHA) == KEY
    assert wrap(KEY, public, SHA) != wrapped
    for bad, key, sha in (
        (wrapped, other, SHA),
        (wrapped, mine, "cd" * 32),
        (bytes([wrapped[0] ^ 1]) + wrapped[1:], mine, SHA),
        (wrapped[:-1] + bytes([wrapped[-1] ^ 1]), mine, SHA),
        (wrapped[:-1], mine, SHA),
        (b"", mine, SHA),
        (bytes(80), mine, SHA),
    ):
        with pytest.raises(WrapError):
            unwrap(bad, key, sha)
    for low in (bytes(32), b"\x01" + bytes(31), b"short"):
        with pytest.raises(WrapError, match="not a public key"):
            wrap(KEY, low, SHA)


def test_a_wrapped_key_is_what_rfc_9180_says() -> None:
    """Opened by the RFC's own words (sections 4 and 5), without the library that wrapped it."""
    mine = X25519PrivateKey.generate()
    public = mine.public_key().public_bytes_raw()
    wrapped = wrap(KEY, public, SHA)

    def extract(suite: bytes, salt: bytes, label: bytes, material: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + material, "sha256")

    def expand(suite: bytes, secret: bytes, label: bytes, info: bytes, length: int) -> bytes:
        text = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
        return hmac.digest(secret, text + b"\x01", "sha256")[:length]

    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x03"
    enc, text = wrapped[:32], wrapped[32:]
    shared = mine.exchange(X25519PublicKey.from_public_bytes(enc))
    shared = expand(kem, extract(kem, b"", b"eae_prk", shared), b"shared_secret", enc + public, 32)
    info = b"airpeft.v1 content key\0" + bytes.fromhex(SHA)
    context = b"\0" + extract(suite, b"", b"psk_id_hash", b"")
    context += extract(suite, b"", b"info_hash", info)
    secret = extract(suite, shared, b"secret", b"")
    key, nonce = (
        expand(suite, secret, name, context, size)
        for name, size in ((b"key", 32), (b"base_nonce", 12))
    )
    assert ChaCha20Poly1305(key).decrypt(nonce, text, b"") == KEY


def test_a_file_of_wrapped_keys_is_read_whole_or_not_at_all() -> None:
    publics = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(3)]
    wraps = Wraps.to(KEY, SHA, publics)
    data = wraps.to_bytes()
    assert Wraps.from_bytes(data, SHA) == wraps
    assert all(public not in data for public in publics), "it does not tell who can read"
    assert tag_of(publics[0], SHA) != tag_of(publics[0], "cd" * 32)
    entry = data[-96:]
    twice = data[:41] + (4).to_bytes(4, "big") + data[45:] + entry
    for bad in (b"", data[:-1], data + b"x", b"airpeft\0" + data[8:], data[:40], twice):
        with pytest.raises(WrapError):
            Wraps.from_bytes(bad, SHA)
    with pytest.raises(WrapError, match="for another payload"):
        Wraps.from_bytes(data, "cd" * 32)
    with pytest.raises(WrapError, match="at most"):
        Wraps.from_bytes(bytes(10_000_000), SHA)
    kept = wraps.merged(Wraps.to(bytes(32), SHA, publics))
    assert kept == wraps, "nobody takes a key away by sending another"
    assert wraps.merged(Wraps(SHA, {}), [publics[0]]).find(publics[0]) is None


def test_a_damaged_file_of_wrapped_keys_is_said_and_not_used(tmp_path: Path) -> None:
    (tmp_path / "wraps").mkdir()
    (tmp_path / wraps_path(SHA)).write_bytes(b"half")
    with pytest.raises(WrapShelfError, match="wrap again: airpeft release wrap"):
        WrapShelf(tmp_path).get(SHA)


def test_an_encryption_key_is_bound_to_the_identity_that_signed_it(fleet: SecretFleet) -> None:
    home = fleet.enrol("kitchen")
    certificates = active_certificates(fleet.gateway.store)
    held = x509.load_pem_x509_certificate(certificates["kitchen"])
    assert encryption_key(held) == public_of(home)
    mallory, public = new_key(), X25519PrivateKey.generate().public_key().public_bytes_raw()
    key = identity._private_key(identity.key_of(home), "key.pem")
    forged = fleet.gateway.authority._sign(
        "kitchen",
        key.public_key(),
        datetime.now(UTC),
        timedelta(days=1),
        [],
        x509.ExtendedKeyUsageOID.CLIENT_AUTH,
        extension(mallory, public),
    )
    with pytest.raises(RecipientError, match="not signed by the identity"):
        encryption_key(forged)
    pem = forged.public_bytes(identity.serialization.Encoding.PEM)
    with pytest.raises(ReaderError, match="kitchen cannot be used"):
        read_readers({"kitchen": pem})
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = request.add_extension(extension(mallory, public), critical=False)
    asked = request.sign(key, hashes.SHA256()).public_bytes(identity.serialization.Encoding.PEM)
    with pytest.raises(EnrolmentError, match=r"bad-request.*not signed by the identity"):
        fleet.gateway.enrolment.enrol(EnrolRequest(token="", certificate_request=asked))
    pinned = {"kitchen": spki(mallory.public_key())}
    with pytest.raises(ReaderError, match="another identity than the roster"):
        read_readers(certificates, pinned)
    assert read_readers({"invented": pem}, {}).keys == {}


def test_an_agent_that_knows_no_seals_refuses_the_whole(fleet: SecretFleet) -> None:
    fleet.enrol("kitchen")
    custom = fleet.publish().statement.to_custom()
    assert custom["critical"] == ["seal"]
    for change in ({"seal": {"check": "ab" * 32, "scheme": "rot13"}}, {"seal": {"check": "x"}}):
        with pytest.raises(StatementError, match="seal"):
            ReleaseStatement.from_custom({**custom, **change})


def test_a_request_without_its_keys_is_not_published(fleet: SecretFleet, tmp_path: Path) -> None:
    fleet.enrol("kitchen")
    out = fleet.make(1)
    request = release.read_request(out)
    (out / WRAPS).write_bytes(b"junk")
    with pytest.raises(release.ReleaseError, match="not a file of wrapped keys"):
        release.read_wraps(request)
    (out / "payload.airpeft").write_bytes(fleet.plain.data)
    with pytest.raises(release.ReleaseError, match="not the payload"):
        release.read_request(out)
    key = make_sealing_key(tmp_path / "second.pem", "correct horse")
    assert key.name == "second.pub.pem"
    with pytest.raises(SealingError, match="wrong or missing passphrase"):
        load_sealing_key(tmp_path / "second.pem", "another")
    with pytest.raises(SealingError, match="never overwritten"):
        make_sealing_key(tmp_path / "second.pem", None)


def _slot_record(record: Any) -> SlotRecord:
    fields = {"statement": record.statement, "sha256": record.sha256, "length": record.length}
    return SlotRecord.of(SignedRelease(**fields, rollout="r", sequence=1))


def _private(home: Path) -> X25519PrivateKey:
    return private_key(identity.load(home).encryption_pem)


def _other_payload() -> bytes:
    return payload.encode(light_adapter(2, rank=16)).data
