"""Short-lived device certificates: renewed by the key, revoked by serial, authorised beforehand."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from typer.testing import CliRunner

from clients import identity
from clients.cli import device as device_app
from clients.connection import Connection, ConnectionLost, Denied
from clients.identity import IdentityError
from clients.link import Backoff
from clients.renewal import Keeper, moment_of
from federation import enrolment_cli
from federation.authority import open_authority
from federation.enrolment import LAPSE_SECONDS, Enrolment, EnrolmentError
from federation.fleet import Fleet, UnknownDeviceError
from federation.store import Store
from protos.messages import EnrolReply, EnrolRequest, WatchRequest
from tests.delivery.rig import Device, ServerProcess, Watcher, enrol, key_pem, new_key, request_for
from tests.waiting import until

DAY = 86400.0
LIFE = timedelta(days=30)


class Office:
    """Enrolment and fleet on a database, with a clock that tests turn."""

    def __init__(self, folder: Path) -> None:
        self.now = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
        self.store = Store.open(folder / "fleet.sqlite", lambda: self.now)
        self.authority = open_authority(folder / "authority", datetime.fromtimestamp(self.now, UTC))
        self.enrolment = Enrolment(self.store, self.authority, lambda: b"root", life=LIFE)
        self.fleet = Fleet(self.store)

    def ask(self, key: Any, token: str = "") -> EnrolReply:
        request = EnrolRequest(token=token, certificate_request=request_for(key))
        reply = self.enrolment.enrol(request)
        self.fleet.refresh(reply.device_id)
        return reply

    def enrol(self, key: Any, name: str | None = None) -> EnrolReply:
        token = self.enrolment.make_token(who="test", device_id=name).secret
        return self.ask(key, token)

    def refuses(self, key: Any, word: str, token: str = "") -> None:
        with pytest.raises(EnrolmentError, match=word):
            self.ask(key, token)


def serial_of(reply: EnrolReply) -> str:
    return f"{x509.load_pem_x509_certificate(reply.certificate).serial_number:x}"


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    yield made
    made.store.close()


# --- the server's side, by the clock --------------------------------------------------------------


def test_a_certificate_lives_for_days_and_is_renewed_by_the_key_alone(office: Office) -> None:
    key = new_key()
    first = office.enrol(key, "kitchen")
    certificate = x509.load_pem_x509_certificate(first.certificate)
    assert certificate.not_valid_after_utc.timestamp() == office.now + 30 * DAY
    office.now += 10 * DAY
    assert office.ask(key).certificate == first.certificate, "a replayed request gains nothing"
    office.now += 10 * DAY
    second = office.ask(key)
    assert second.device_id == "kitchen"
    assert second.certificate != first.certificate
    assert office.fleet.admits("kitchen", serial_of(first)), "both hold until the first one ends"
    assert office.fleet.admits("kitchen", serial_of(second))
    office.now += 10 * DAY + 1
    assert not office.fleet.admits("kitchen", serial_of(first))
    assert office.fleet.admits("kitchen", serial_of(second))
    assert not office.fleet.admits("attic", serial_of(second))
    assert [line["action"] for line in office.store.audit()] == ["renew", "enrol", "token"]


def test_a_device_that_was_off_for_months_comes_back_and_one_off_for_a_year_does_not(
    office: Office,
) -> None:
    key = new_key()
    office.enrol(key, "kitchen")
    office.now += 30 * DAY + LAPSE_SECONDS - 1
    back = office.ask(key)
    assert office.fleet.admits("kitchen", serial_of(back))
    office.now += 30 * DAY + LAPSE_SECONDS + 1
    office.refuses(key, "lapsed-certificate")


def test_a_revoked_device_is_not_renewed_and_its_key_enrols_nothing(office: Office) -> None:
    key = new_key()
    held = office.enrol(key, "kitchen")
    token = office.enrolment.make_token(who="test").secret
    office.fleet.revoke("kitchen", who="test", why="stolen")
    assert not office.fleet.admits("kitchen", serial_of(held))
    office.refuses(key, "revoked-device")
    office.refuses(key, "revoked-device", token)
    assert Fleet(office.store).admits("kitchen", serial_of(held)) is False, "nor after a restart"
    assert office.enrol(new_key()).device_id != "kitchen"


def test_one_certificate_is_revoked_by_serial_and_the_device_renews(office: Office) -> None:
    key = new_key()
    held = office.enrol(key, "kitchen")
    with pytest.raises(UnknownDeviceError, match="no certificate"):
        office.fleet.revoke("kitchen", who="test", why="", serial="ab")
    office.fleet.revoke("kitchen", who="test", why="copied", serial=serial_of(held))
    assert not office.fleet.admits("kitchen", serial_of(held))
    again = office.ask(key)
    assert serial_of(again) != serial_of(held)
    assert office.fleet.admits("kitchen", serial_of(again))


def test_a_key_enrols_one_device_and_a_second_token_does_not_make_a_second(office: Office) -> None:
    key = new_key()
    office.enrol(key, "kitchen")
    token = office.enrolment.make_token(who="test").secret
    office.refuses(key, "key-taken", token)
    assert office.ask(new_key(), token).device_id != "kitchen", "the token was not used up"


def test_an_authorised_key_enrols_once_without_a_token(office: Office) -> None:
    key, pem = new_key(), identity.public_key_of
    office.refuses(key, "unknown-key")
    authorise = office.enrolment.authorise_key
    authorise(pem(key_pem(key)), who="test", device_id="cellar", tags={"site": "north"})
    reply = office.ask(key)
    assert reply.device_id == "cellar"
    assert office.fleet.device("cellar")["tags"] == {"site": "north"}
    assert office.ask(key).certificate == reply.certificate, "asked again: the same"
    with pytest.raises(EnrolmentError, match="key-taken"):
        authorise(pem(key_pem(key)), who="test")
    with pytest.raises(EnrolmentError, match="name-taken"):
        authorise(pem(key_pem(new_key())), who="test", device_id="cellar")
    with pytest.raises(EnrolmentError, match="bad-request"):
        authorise(b"nonsense", who="test")
    late = new_key()
    authorise(pem(key_pem(late)), who="test", seconds=DAY)
    office.now += DAY + 1
    office.refuses(late, "unknown-key")


def test_a_database_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    office = Office(tmp_path)
    key = new_key()
    held = office.enrol(key, "kitchen")
    office.store.close()
    with sqlite3.connect(tmp_path / "fleet.sqlite") as old:
        old.execute("DROP TABLE timestamps")
        old.execute("DROP TABLE certificates")
        old.execute("DROP TABLE authorised_keys")
        old.execute("DROP INDEX devices_by_key")
        old.execute("DROP TABLE marks")
        old.execute("ALTER TABLE devices DROP COLUMN gateway")
        old.execute("UPDATE alembic_version SET version_num = '0002'")
    old.close()
    office = Office(tmp_path)
    assert office.fleet.admits("kitchen", serial_of(held))
    assert office.ask(key).certificate == held.certificate
    office.store.close()


# --- the device's side, by the clock --------------------------------------------------------------


class Owner:
    """A device's home with a :class:`Keeper`, talking to an :class:`Office` without a wire."""

    def __init__(self, office: Office, home: Path) -> None:
        self.office, self.asked, self.ticks = office, 0, 0.0
        self.trouble: Exception | None = None
        key = identity.key_of(home)
        token = office.enrolment.make_token(who="test").secret
        request = EnrolRequest(token=token, certificate_request=identity.certificate_request(key))
        reply = office.enrolment.enrol(request)
        who = identity.save(home, reply, key_pem=key, fleet="f:1", enrol="e:1")
        self.home = home
        self.keeper = Keeper(
            home,
            who,
            now=lambda: datetime.fromtimestamp(office.now, UTC),
            backoff=Backoff(random.SystemRandom(), base=60.0, cap=600.0),
            connect=lambda who: who,  # type: ignore[arg-type, return-value]
            renew=self.answer,
            clock=lambda: self.ticks,
        )

    def answer(self, target: str, authority: bytes, request: EnrolRequest) -> EnrolReply:
        assert (target, authority) == ("e:1", self.office.authority.pem)
        self.asked += 1
        if self.trouble:
            raise self.trouble
        return self.office.enrolment.enrol(request)


def test_a_device_renews_at_a_moment_of_its_own_and_keeps_what_it_got(
    office: Office, tmp_path: Path
) -> None:
    owner = Owner(office, tmp_path / "home")
    start, end = owner.keeper.who.life
    share = (moment_of(owner.keeper.who) - start) / (end - start)
    assert 0.6 <= share <= 0.75
    assert owner.keeper.connect() is owner.keeper.who
    assert owner.asked == 0
    office.now += 24 * DAY
    assert owner.keeper.is_due()
    renewed = owner.keeper.connect()
    assert (owner.asked, owner.keeper.is_due()) == (1, False)
    assert identity.load(owner.home) == renewed == owner.keeper.who
    assert owner.keeper.who.life[1] > end


def test_while_renewing_fails_the_old_certificate_is_used_and_tries_are_spaced(
    office: Office, tmp_path: Path
) -> None:
    owner = Owner(office, tmp_path / "home")
    before = owner.keeper.who
    office.now += 24 * DAY
    for trouble in (ConnectionLost("away"), Denied("permission-denied", "revoked-device")):
        owner.trouble, asked = trouble, owner.asked
        for _ in range(5):
            assert owner.keeper.connect() is before
        assert owner.asked == asked + 1, "not at every connection"
        owner.ticks += 3600
    owner.trouble = None
    assert owner.keeper.connect() is not before
    # what comes back must be this device's, this fleet's, and newer
    now = datetime.fromtimestamp(office.now, UTC)
    stranger = open_authority(tmp_path / "other", now)
    request = identity.certificate_request(owner.keeper.who.key_pem)
    name = owner.keeper.who.device_id
    for pem, word in (
        (stranger.issue(request, name, now).pem, "not of this fleet"),
        (office.authority.issue(request, "another", now).pem, "another"),
        (owner.keeper.who.certificate_pem, "as the old one"),
        (office.authority.issue(request_for(new_key()), name, now).pem, "another key"),
    ):
        with pytest.raises(IdentityError, match=word):
            identity.renewed(owner.home, owner.keeper.who, pem)
    assert identity.load(owner.home) == owner.keeper.who


# --- on the wire ----------------------------------------------------------------------------------


def test_expired_or_revoked_is_refused_on_the_wire_and_renewal_brings_back(
    tmp_path: Path,
) -> None:
    arguments = ("--heartbeat-seconds", "0.3", "--certificate-days", "0.01")
    server = ServerProcess(tmp_path / "home", arguments).start()
    try:
        device = Device(server, "kitchen")
        first = device.reply
        authority = open_authority(server.home / "authority", datetime.now(UTC))
        # What the server issued a while ago: signed by the fleet's authority, and over.
        past = authority.issue(
            request_for(device.key), "kitchen", datetime.now(UTC) - LIFE, timedelta(days=1)
        )
        home = tmp_path / "device"
        key = identity.key_of(home)
        (home / "identity" / "key.pem").write_bytes(key_pem(device.key))
        who = identity.save(
            home,
            EnrolReply(
                device_id="kitchen",
                certificate=past.pem,
                authority=first.authority,
                root=first.root,
            ),
            key_pem=key_pem(device.key),
            fleet=server.endpoints["fleet"],
            enrol=server.endpoints["enrol"],
        )
        assert key
        stale = Connection(who)
        with pytest.raises(ConnectionLost):  # refused in the handshake
            next(iter(stale.watch(WatchRequest())))
        stale.close()
        keeper = Keeper(
            home,
            who,
            now=lambda: datetime.now(UTC),
            backoff=Backoff(random.SystemRandom(), base=0.01),
        )
        fresh = keeper.connect()
        assert next(iter(fresh.watch(WatchRequest())))
        fresh.close()
        with Watcher(device) as watcher:
            until(lambda: watcher.bundles, what="the stream")
            with server.operator() as operator:
                operator.revoke("kitchen", "stolen")
                until(lambda: watcher.ended, what="the cut stream")
                told = 'airpeft_requests_refused_total{call="watch",reason="not-admitted"}'
                until(lambda: told in operator.metrics(), what="its reason")
        assert not keeper.renew()
        with pytest.raises(grpc.RpcError, match="revoked-device"):
            enrol(device.enrolment, "", request_for(device.key))
        with server.operator() as operator:
            assert 'airpeft_enrolments_total{result="revoked-device"} 2.0' in operator.metrics()
    finally:
        server.stop()


def test_the_command_line_authorises_a_key_and_the_device_uses_it(
    server: ServerProcess, tmp_path: Path
) -> None:
    home, run = tmp_path / "device", CliRunner()
    public = run.invoke(device_app, ["key", "--home", str(home)]).stdout
    assert public.startswith("-----BEGIN PUBLIC KEY-----")
    (tmp_path / "key.pem").write_text(public)
    words = ["authorise", str(tmp_path / "key.pem"), "--out", str(tmp_path / "enrol.json")]
    words += ["--device", "authorised", "--home", str(server.home), "--format", "json"]
    assert run.invoke(enrolment_cli.fleet, words).exit_code == 0
    document = json.loads((tmp_path / "enrol.json").read_text())
    assert set(document) == {"enrol", "fleet", "authority_pem"}
    private = (home / "identity" / "key.pem").read_bytes()
    reply = enrol(document, "", identity.certificate_request(private))
    assert reply.device_id == "authorised"
    refused = run.invoke(enrolment_cli.fleet, words)
    assert refused.exit_code == 2
    assert "key-taken" in refused.stderr
    missing = run.invoke(enrolment_cli.fleet, ["authorise", "none.pem", *words[2:]])
    assert "cannot read the public key" in missing.stderr
