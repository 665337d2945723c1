"""The server's disk is full at any write that it makes: refused, counted, nothing lost or torn."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aggregation.durable import StorageError
from clients.connection import Connection, ConnectionLost
from clients.telemetry import ReportQueue
from federation.authority import open_authority
from federation.enrolment import Enrolment
from federation.key_change import KeyChange
from federation.metrics import Metrics
from federation.repository import Repository
from federation.rollout import ACTIVE, State, Verb
from federation.store import Store
from federation.tables import METADATA
from protos.messages import DeviceEvent, EnrolRequest
from tests.delivery.rig import new_key, request_for
from tests.delivery.test_ticker import FOUR, House, roll_out
from tests.device.world import Gateway, enrolled
from tests.full_disk import full_after
from tests.trust.ceremony import Ceremony
from tests.trust.fleet_of_one import Device, Publisher, payload_of, statement
from tests.trust.test_durability import copies

Work = Callable[[Repository], object]
NUMBERS = itertools.count()
ENDED = {State.ABORTED, State.DONE, State.ROLLED_BACK}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is counted and not done: nothing here is killed, and thousands take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- the repository -------------------------------------------------------------------------------


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path / "server")
    made.order(made.release(1))
    return made


def every_write(
    publisher: Publisher, scratch: Path, work: Work
) -> Iterator[tuple[int, Repository, bool]]:
    """The work with a disk that is full from the 1st, 2nd, ... write on; whether it was refused."""
    fresh = copies(publisher.repository.folder, scratch)
    for number in itertools.count():
        folder = fresh()
        repository = Repository(folder, publisher.online)
        said = ""
        with full_after(number, folder) as disk:
            try:
                work(repository)
            except StorageError as error:
                said = str(error)
        assert ("the disk is full" in said) == bool(disk.refused), f"write {number}: {said}"
        yield number, repository, bool(said)
        if not said:
            assert number > 3, "the work never touched the disk"
            return


def whole(repository: Repository, publisher: Publisher) -> None:
    """What is served verifies on a device, and so does what a new process would serve then."""
    place = repository.folder.with_suffix(f".{next(NUMBERS)}")
    again = Repository(shutil.copytree(repository.folder, place), publisher.online)
    for record in again.releases():
        assert again.read(record.path) == payload_of(record.statement.counter)
    device = Device(place.parent / f"device{place.suffix}", publisher)
    assert device.installs(repository.bundle()).name == "stable-1"
    assert device.installs(again.bundle()).name == "stable-1"
    shutil.rmtree(place)


def works(publisher: Publisher, tmp_path: Path) -> dict[str, Work]:
    signed, data = publisher.signed_adapters(statement(2), payload_of(2)), payload_of(2)
    people = Ceremony(publisher, tmp_path)
    change = people.request(KeyChange(thresholds={"root": 3}))
    people.sign(change, ("root-1", "root-2", "root-3"))
    later = publisher.now + timedelta(hours=6)

    def keys(repository: Repository) -> None:
        publisher.repository = repository
        people.publish(change)

    return {
        "release": lambda r: r.publish_release(signed, data, now=publisher.now),
        "date": lambda r: r.refresh_timestamp(later),
        "keys": keys,
    }


@pytest.mark.parametrize("name", ["release", "date", "keys"])
def test_at_every_write_of_a_repository(publisher: Publisher, tmp_path: Path, name: str) -> None:
    original = publisher.repository
    work = works(publisher, tmp_path / "people")[name]
    for number, repository, refused in every_write(publisher, tmp_path / "full", work):
        whole(repository, publisher)
        before = repository.versions()["timestamp"]
        work(repository)
        if refused:
            assert repository.versions()["timestamp"] >= before, f"write {number}"
        whole(repository, publisher)
        publisher.repository = original


# --- the database ---------------------------------------------------------------------------------


class Pages:
    """Lets a database grow by so many pages and no further; SQLite itself says that it is full."""

    def __init__(self, store: Store) -> None:
        self.limit = self.free = 2**30
        sa.event.listen(store.engine, "begin", self._begin)
        self._store = store

    def _begin(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={self.limit}")

    def allow(self, more: int) -> None:
        self.limit = self.free
        with self._store.read() as connection:
            self.limit = connection.exec_driver_sql("PRAGMA page_count").scalar() + more


def rows(store: Store) -> dict[str, Any]:
    """Everything that the database knows."""
    with store.read() as connection:
        return {
            table.name: sorted(map(str, connection.execute(sa.select(table))))
            for table in METADATA.sorted_tables
        }


def grows(store: Store, work: Callable[[], object]) -> int:
    """Do the work with room for 0, 1, 2, ... more pages; how often there was too little."""
    pages, before = Pages(store), rows(store)
    for more in itertools.count():
        pages.allow(more)
        try:
            work()
        except StorageError:
            pages.limit = pages.free
            assert rows(store) == before, f"{more} pages: a part of it was kept"
        else:
            pages.limit = pages.free
            assert rows(store) != before
            return more
    raise AssertionError


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "home")
    made.enrol(*FOUR)
    yield made
    made.store.close()


def test_at_every_page_of_enrolments(house: House) -> None:
    authority = open_authority(house.home / "authority", datetime.now(UTC))
    enrolment = Enrolment(house.store, authority, house.repository.root)
    requests = []
    for number in range(12):
        token = enrolment.make_token(who="test", device_id=f"new-{number}").secret
        request = EnrolRequest(token=token, certificate_request=request_for(new_key()))
        requests.append(request)
    times = [grows(house.store, lambda r=request: enrolment.enrol(r)) for request in requests]
    assert sum(times) > 2
    for request, count in zip(requests, times, strict=True):
        assert enrolment.enrol(request).device_id.startswith("new-"), "asked again, the same"
        assert count < 20


def test_at_every_page_of_a_rollouts_start(house: House) -> None:
    """Decided and not published, or not decided: the next tick or the same command goes on."""
    name, refused = house.publish(1), 0
    for number in range(30):  # on whichever page the database is nearly full
        pages = Pages(house.store)
        pages.allow(number % 2)
        try:
            roll_out(house, name)
        except StorageError:
            refused += 1
        pages.limit = pages.free
        house.ticker.tick()
        assert house.ticker.trouble == ""
        newest = house.ticker.records()[0].rollout
        if newest.state in ACTIVE:
            assert house.repository.round().rollout == newest.id
        if newest.state not in ENDED:
            house.ticker.act(newest.id, Verb.ABORT, who="test")
    assert refused > 2
    assert house.store.verify_audit().broken_at is None


def test_reports_that_find_no_room_stay_on_the_device(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "server")
    gateway.start()
    home = tmp_path / "device"
    home.mkdir()
    try:
        who = enrolled(gateway, home)
        queue = ReportQueue(home, device_id="d-1", sign=who.sign, now_ms=lambda: 1)
        for _ in range(40):
            queue.put(DeviceEvent.STARTED, detail="x" * 400)
        pages = Pages(gateway.store)
        pages.allow(2)
        connection = Connection(who)
        with pytest.raises(ConnectionLost, match="cannot store reports"):
            queue.deliver(connection.report)
        assert queue.pending() == 40
        assert gateway.reports() == []
        metrics: Metrics = gateway.service._metrics
        assert metrics.refused.labels("report", "storage")._value.get() == 1
        pages.limit = pages.free
        assert queue.deliver(connection.report) == 40
        assert [one.sequence for one in gateway.reports()] == list(range(1, 41))
        connection.close()
    finally:
        gateway.close()
