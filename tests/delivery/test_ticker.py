"""The ticker between database and repository: crash-safe order, one rollout at a time, audit."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from aggregation.durable import StorageError
from federation import migrations, reports, tables
from federation.authority import open_authority
from federation.enrolment import Enrolment
from federation.first_start import Passphrases, open_repository
from federation.fleet import Fleet
from federation.gateways import keep_working
from federation.orders import BASE
from federation.policy import Policy
from federation.published import NotFoundError
from federation.rate import Rate
from federation.repository import Repository
from federation.rollout import Rollout, State, Verb
from federation.rollout_book import NoRolloutError
from federation.store import Store, StoreError
from federation.ticker import Ticker
from federation.waves import RolloutError, Wave
from protos.messages import (
    DeviceEvent,
    EnrolRequest,
    Quality,
    RejectReason,
    Report,
    SignedReport,
    encode_report,
)
from protos.signed import RoundDocument
from tests.delivery.rig import new_key, release_name, request_for, signed_release

WAVES = (Wave(count=1), Wave(percent=50), Wave(percent=100))
START = datetime(2026, 5, 1, tzinfo=UTC).timestamp()


class Kill(BaseException):
    """What kill -9 looks like from inside: nobody catches it."""


@dataclass
class House:
    """Database and repository of a server in one folder, without its ports."""

    home: Path
    now: list[float] = field(default_factory=lambda: [START])
    database: sa.URL | None = None

    def __post_init__(self) -> None:
        moment = datetime.fromtimestamp(self.now[0], UTC)
        self.repository = open_repository(
            self.home, offline_keys=None, passphrases=Passphrases(), now=moment
        )
        self.keys: dict[str, Any] = {}
        self.sequences: dict[str, int] = {}
        self.start_again()

    def start_again(self, repository: type[Repository] | None = None) -> None:
        """What a new process finds."""
        if hasattr(self, "store"):
            self.store.close()
        if self.database is None:
            self.store = Store.open(self.home / "fleet.sqlite", lambda: self.now[0])
        else:
            self.store = Store.connect(self.database, clock=lambda: self.now[0])
        self.fleet = Fleet(self.store)
        kind = repository or Repository
        self.repository = kind(self.home / "repository", self.repository._online)
        self.changes = 0
        self.ticker = Ticker(self.store, self.fleet, self.repository, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def enrol(self, *names: str) -> None:
        authority = open_authority(self.home / "authority", datetime.now(UTC))
        enrolment = Enrolment(self.store, authority, self.repository.root)
        for name in names:
            self.keys[name] = new_key()
            token = enrolment.make_token(who="test", device_id=name).secret
            request = request_for(self.keys[name])
            enrolment.enrol(EnrolRequest(token=token, certificate_request=request))
        self.fleet.refresh()

    def publish(self, counter: int) -> str:
        payload = b"payload" * counter
        metadata = signed_release(self.home, self.repository.adapters(), counter, payload)
        return self.repository.publish_release(metadata, payload, now=datetime.now(UTC)).name

    def say(self, name: str, event: DeviceEvent, **fields: Any) -> None:
        self.sequences[name] = self.sequences.get(name, 0) + 1
        body = encode_report(
            Report(
                device_id=name,
                sequence=self.sequences[name],
                time_unix_ms=0,
                event=event,
                **fields,
            )
        )
        signature = self.keys[name].sign(body, ec.ECDSA(hashes.SHA256()))
        self.fleet.observe(name, [SignedReport(body=body, signature=signature)])

    def told(self, name: str) -> str | None:
        """The release that the round in force assigns to a device; None: stay as you are."""
        document = self.repository.round()
        wanted = document.assignment_of(name)
        return release_name(wanted) if wanted is not None else None

    def obey(self, rollout: Rollout) -> None:
        """Every device does what the round says."""
        for name in self.keys:
            wanted = self.told(name)
            if wanted is not None:
                self.say(name, DeviceEvent.COMMITTED, release=wanted, rollout=rollout.id)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


FOUR = ("d-a", "d-b", "d-c", "d-d")


def count(house: House, release: str) -> int:
    return sum(house.told(name) == release for name in house.keys)


def roll_out(house: House, release: str, waves: tuple[Wave, ...] = WAVES, **policy: Any) -> Rollout:
    return house.ticker.start(release, waves, Policy(**policy), who="ann", why="because")


def run_to_end(house: House, rollout: Rollout) -> State:
    for _ in range(len(rollout.waves) + 2):
        house.obey(rollout)
        house.ticker.tick()
    return house.ticker.record(rollout.id).rollout.state


def test_a_rate_holds_across_kills_and_goes_on(house: House) -> None:
    house.enrol(*FOUR)
    waves = (Wave(percent=100),)
    rollout = roll_out(house, house.publish(1), waves, rate=Rate(per_minute=1))
    reached = [count(house, "stable-1")]
    for _ in range(8):
        house.now[0] += 30.0
        house.start_again()  # as after kill -9: all that counts is in the database
        house.ticker.tick()
        house.start_again()
        house.ticker.tick()
        house.obey(rollout)
        reached.append(count(house, "stable-1"))
    house.ticker.tick()
    assert reached == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    stored = house.ticker.record(rollout.id).rollout
    assert (stored.state, stored.notified) == (State.DONE, 4)
    assert sum(" more told, " in line["why"] for line in house.store.audit()) == 3


def test_a_rollout_goes_through_its_waves_and_everything_is_audited(house: House) -> None:
    house.enrol(*FOUR)
    rollout = roll_out(house, house.publish(1))
    assert rollout.previous == BASE
    reached = []
    for _ in range(3):
        reached.append(count(house, "stable-1"))
        house.obey(rollout)
        house.ticker.tick()
    assert reached == [1, 2, 4]
    assert house.ticker.record(rollout.id).rollout.state is State.DONE
    lines = [(line["who"], line["subject"], line["why"]) for line in house.store.audit()]
    assert lines[0] == ("ticker", "r-1", "running -> done: every wave has settled")
    assert any(who == "ann" and "wave 1 of 3" in why and "because" in why for who, _, why in lines)


def test_a_failed_canary_takes_everybody_back_and_the_rest_never_hear_of_it(house: House) -> None:
    house.enrol(*FOUR)
    assert run_to_end(house, roll_out(house, house.publish(1))) is State.DONE
    rollout = roll_out(house, house.publish(2))
    assert rollout.previous.release == "stable-1"
    canary = next(name for name in FOUR if house.told(name) == "stable-2")
    assert [house.told(name) for name in FOUR if name != canary] == ["stable-1"] * 3
    house.say(
        canary,
        DeviceEvent.REVERTED,
        release="stable-2",
        rollout=rollout.id,
        reason=RejectReason.QUALITY_REGRESSED,
        quality=Quality(examples=50, accuracy_before=0.9, accuracy_after=0.4),
    )
    house.ticker.tick()
    record = house.ticker.record(rollout.id).rollout
    assert record.state is State.ROLLED_BACK
    assert "quality-regressed" in record.why
    assert [house.told(name) for name in FOUR] == ["stable-1"] * 4
    whys = [line["why"] for line in house.store.audit()]
    for step in ("running -> halted", "halted -> rolling_back", "rolling_back -> rolled_back"):
        assert any(why.startswith(step) for why in whys), step


def test_however_much_is_reported_there_is_rest_between_two_looks() -> None:
    """A look at thousands of devices takes long; one after the other they would fill a core."""
    looks: list[float] = []

    async def watch() -> None:
        poke, enough = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def look(_poked: bool) -> None:
            looks.append(time.monotonic())
            threading.Event().wait(0.03)
            loop.call_soon_threadsafe(poke.set)  # devices go on reporting
            if len(looks) == 4:
                loop.call_soon_threadsafe(enough.set)

        task = asyncio.create_task(keep_working(look, poke, 0.01))
        async with asyncio.timeout(20.0):
            await enough.wait()
        task.cancel()

    asyncio.run(watch())
    assert all(later - earlier > 4 * 0.03 for earlier, later in itertools.pairwise(looks))


def test_a_device_that_says_much_does_not_fill_the_disk(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "HEALTH_KEPT", 5)
    monkeypatch.setattr(reports, "OTHERS_KEPT", 3)
    house.enrol("d-a", "d-b")
    rollout = roll_out(house, house.publish(1))
    house.say("d-b", DeviceEvent.COMMITTED, release="stable-1", rollout=rollout.id)
    for _ in range(4):
        house.say("d-a", DeviceEvent.COMMITTED, release="stable-1", rollout=rollout.id)
        for _ in range(4):
            house.say("d-a", DeviceEvent.HEALTH)
    kept = [(one["sequence"], one["event"]) for one in house.fleet.device("d-a")["reports"]]
    health = [(number, "health") for number in (20, 19, 18, 17, 15)]
    others = [(number, "committed") for number in (16, 11, 6)]
    assert kept == sorted(health + others, reverse=True)
    assert len(house.fleet.device("d-b")["reports"]) == 1
    assert {word["device_id"] for word in house.fleet.outcomes(rollout.id)} == {"d-a", "d-b"}


def test_back_to_the_base_where_there_was_no_release_before(house: House) -> None:
    house.enrol(*FOUR)
    rollout = roll_out(house, house.publish(1))
    house.obey(rollout)
    house.ticker.tick()
    house.obey(rollout)
    back = house.ticker.act(rollout.id, Verb.ROLLBACK, who="ann", why="changed my mind")
    assert back.state is State.ROLLING_BACK
    assert [house.told(name) for name in FOUR] == [""] * 4
    house.ticker.tick()
    assert house.ticker.record(rollout.id).rollout.state is State.ROLLING_BACK, "some still run it"
    house.obey(rollout)
    house.ticker.tick()
    assert house.ticker.record(rollout.id).rollout.state is State.ROLLED_BACK


def test_what_a_device_said_of_another_release_does_not_count_for_this_one(house: House) -> None:
    """While it waits for its wave a device may well commit the release before, under this name."""
    house.enrol(*FOUR)
    run_to_end(house, roll_out(house, house.publish(1)))
    rollout = roll_out(house, house.publish(2), (Wave(count=1), Wave(percent=100)))
    later = next(name for name in FOUR if house.told(name) == "stable-1")
    house.say(later, DeviceEvent.COMMITTED, release="stable-1", rollout=rollout.id)
    house.ticker.tick()
    assert house.ticker.record(rollout.id).rollout.wave == 0
    assert run_to_end(house, rollout) is State.DONE


def test_one_rollout_at_a_time_and_only_the_newest_rolls_back(house: House) -> None:
    house.enrol(*FOUR)
    first = roll_out(house, house.publish(1))
    with pytest.raises(RolloutError, match=r"r-1 of stable-1 is running"):
        roll_out(house, house.publish(2))
    run_to_end(house, first)
    second = roll_out(house, "stable-2")
    run_to_end(house, second)
    with pytest.raises(RolloutError, match=r"r-2 came after r-1"):
        house.ticker.act(first.id, Verb.ROLLBACK, who="ann")
    back = roll_out(house, "stable-1")  # the operator's way back: an older release, rolled out
    assert back.previous.release == "stable-2"


def test_what_cannot_start_leaves_nothing_behind(house: House) -> None:
    name = house.publish(1)
    with pytest.raises(RolloutError, match="no device is enrolled"):
        roll_out(house, name)
    assert [record.rollout.state for record in house.ticker.records()] == [State.ABORTED]
    assert house.repository.round().sequence == 0
    house.enrol("d-a")
    assert roll_out(house, name).state is State.RUNNING
    with pytest.raises(NotFoundError, match="stable-1"):
        house.ticker.create("stable-9", WAVES, Policy(), who="ann")
    with pytest.raises(NoRolloutError, match="r-77"):
        house.ticker.act("r-77", Verb.PAUSE, who="ann")


def test_a_revoked_device_counts_for_nothing(house: House) -> None:
    house.enrol(*FOUR)
    rollout = roll_out(house, house.publish(1), (Wave(count=2), Wave(percent=100)))
    first, second = (name for name in FOUR if house.told(name) == "stable-1")
    house.say(first, DeviceEvent.COMMITTED, release="stable-1", rollout=rollout.id)
    house.say(second, DeviceEvent.FAILED, release="stable-1", rollout=rollout.id)
    house.fleet.revoke(second, who="ann", why="stolen")
    house.ticker.tick()
    now = house.ticker.record(rollout.id).rollout
    assert (now.state, now.wave) == (State.RUNNING, 1)


def test_a_device_that_has_the_release_already_settles_at_once(house: House) -> None:
    house.enrol(*FOUR)
    house.publish(1)
    aborted = roll_out(house, "stable-1")
    house.obey(aborted)
    house.ticker.act(aborted.id, Verb.ABORT, who="ann")
    assert [house.told(name) for name in FOUR] == [None] * 4
    again = roll_out(house, "stable-1", (Wave(percent=100),))
    silent = [
        name for name in FOUR if house.fleet.device(name)["running"] != "stable-1"
    ]  # all but the canary of the first attempt
    assert len(silent) == 3
    for name in silent:
        house.say(name, DeviceEvent.COMMITTED, release="stable-1", rollout=again.id)
    house.ticker.tick()
    assert house.ticker.record(again.id).rollout.state is State.DONE


def killed(when: str) -> type[Repository]:
    """A repository whose process dies just before or just after a round reaches the disk."""

    class Mortal(Repository):
        def publish_round(self, document: RoundDocument, *, now: datetime) -> RoundDocument:
            if when == "after":
                super().publish_round(document, now=now)
            raise Kill

    return Mortal


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_between_the_decision_and_its_publication_is_made_good(
    house: House, when: str
) -> None:
    house.enrol(*FOUR)
    name = house.publish(1)
    house.start_again(killed(when))
    with pytest.raises(Kill):
        roll_out(house, name)
    assert house.ticker.record("r-1").rollout.state is State.RUNNING
    house.start_again()
    house.ticker.tick()
    assert count(house, name) == 1
    assert house.repository.round().sequence == 1
    house.start_again()
    house.ticker.tick()
    assert house.repository.round().sequence == 1, "published twice"
    assert run_to_end(house, house.ticker.record("r-1").rollout) is State.DONE


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_in_the_middle_of_a_roll_back_still_ends_rolled_back(
    house: House, when: str
) -> None:
    house.enrol(*FOUR)
    rollout = roll_out(house, house.publish(1))
    canary = next(name for name in FOUR if house.told(name) == "stable-1")
    house.say(canary, DeviceEvent.REJECTED, release="stable-1", rollout=rollout.id)
    house.start_again(killed(when))
    with pytest.raises(Kill):
        house.ticker.tick()
    house.start_again()
    house.ticker.tick()
    assert house.ticker.record(rollout.id).rollout.state is State.ROLLED_BACK
    assert [house.told(name) for name in FOUR] == [""] * 4


def test_a_full_disk_is_told_and_the_next_tick_publishes(house: House) -> None:
    house.enrol(*FOUR)
    name = house.publish(1)
    refusals = [StorageError("cannot write: the disk is full")] * 2

    class Full(Repository):
        def publish_round(self, document: RoundDocument, *, now: datetime) -> RoundDocument:
            if refusals:
                raise refusals.pop()
            return super().publish_round(document, now=now)

    house.start_again(Full)
    roll_out(house, name)
    assert "disk is full" in house.ticker.trouble
    assert count(house, name) == 0
    house.ticker.tick()
    house.ticker.tick()
    assert house.ticker.trouble == ""
    assert count(house, name) == 1
    assert house.changes == 1


def test_sequences_go_on_where_the_repository_is_even_with_a_new_database(house: House) -> None:
    house.enrol(*FOUR)
    run_to_end(house, roll_out(house, house.publish(1)))
    before = house.repository.round().sequence
    house.store.close()
    for file in house.home.glob("fleet.sqlite*"):
        file.unlink()
    house.start_again()
    house.sequences.clear()
    house.enrol(*FOUR)
    roll_out(house, house.publish(2))
    assert house.repository.round().sequence == before + 1
    assert count(house, "stable-2") == 1


def test_the_timestamp_is_dated_anew_before_it_grows_old(house: House) -> None:
    house.ticker.tick()
    version = house.repository.versions()["timestamp"]
    house.now[0] += timedelta(hours=5).total_seconds()
    house.ticker.tick()
    assert house.repository.versions()["timestamp"] == version
    house.now[0] += timedelta(hours=2).total_seconds()
    house.ticker.tick()
    assert house.repository.versions()["timestamp"] == version + 1
    assert house.changes == 1


@pytest.mark.parametrize(
    "change",
    [lambda t: t.update().values(why="nothing happened"), lambda t: t.delete()],
    ids=["update", "delete"],
)
def test_the_audit_log_only_grows(house: House, change: Callable[[sa.Table], Any]) -> None:
    with house.store.write() as connection:
        house.store.log(connection, "ann", "test", "x", "y")

    def tamper() -> None:
        with house.store.write() as connection:
            connection.execute(change(tables.audit))

    with pytest.raises(sa.exc.IntegrityError, match="only grows"):
        tamper()
    assert house.store.audit()[0]["why"] == "y"


def test_the_migrations_make_the_tables_that_the_code_uses(house: House) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with house.store.read() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, tables.METADATA) == []
        assert context.get_current_revision() == migrations.HEAD
    assert ScriptDirectory(migrations.__path__[0]).get_current_head() == migrations.HEAD


def test_a_database_of_a_newer_version_or_none_at_all_is_refused(
    house: House, tmp_path: Path
) -> None:
    with house.store.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    house.store.close()
    with pytest.raises(StoreError, match="newer version"):
        Store.open(tmp_path / "fleet.sqlite")
    (tmp_path / "other.sqlite").write_bytes(b"not a database, but long enough" * 100)
    with pytest.raises(StoreError, match="cannot open the database"):
        Store.open(tmp_path / "other.sqlite")
