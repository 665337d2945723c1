"""A device that was off for six weeks: certificate and metadata have ended, reports lie on disk."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clients import identity
from clients.connection import Connection, ConnectionLost, enrol
from clients.link import Backoff
from clients.renewal import Keeper
from clients.telemetry import ReportQueue
from clients.trust import Trust
from protos.messages import DeviceEvent, EnrolRequest, WatchRequest
from tests.device.small_engine import SmallEngine, small_adapter
from tests.device.test_full_disk import Unit
from tests.device.world import HOST, Gateway, Running
from tests.waiting import until

WEEKS = timedelta(weeks=6)


@pytest.fixture
def gateway(tmp_path: Path):
    running = Gateway(tmp_path / "server", now=datetime.now(UTC) - WEEKS)
    running.start()
    yield running
    running.close()


def test_off_for_weeks_and_back(gateway: Gateway, home: Path) -> None:
    then = datetime.now(UTC) - WEEKS
    gateway.store.clock = lambda: time.time() - WEEKS.total_seconds()
    key = identity.key_of(home)
    token = gateway.enrolment.make_token(who="test", device_id="d-1").secret
    request = EnrolRequest(token=token, certificate_request=identity.certificate_request(key))
    reply = enrol(f"{HOST}:{gateway.enrol_port}", gateway.authority.pem, request)
    doors = {"fleet": f"{HOST}:{gateway.port}", "enrol": f"{HOST}:{gateway.enrol_port}"}
    who = identity.save(home, reply, key_pem=key, **doors)

    first = gateway.release(small_adapter(1), 1, now=then)
    gateway.publisher.order(first, rollout="r1")
    queue = ReportQueue(
        home, device_id="d-1", sign=who.sign, now_ms=lambda: int(then.timestamp() * 1000)
    )
    unit = Unit(home, SmallEngine(), gateway.publisher, queue=queue)
    unit.agent.start()
    unit.hear()
    assert unit.runtime.pin().name == "stable-1"
    assert queue.pending() >= 3

    gateway.store.clock = time.time  # six weeks later
    gateway.fleet.refresh()
    assert who.life[1] < datetime.now(UTC)
    old = Connection(who)
    with pytest.raises(ConnectionLost):
        next(iter(old.watch(WatchRequest())))
    old.close()
    gateway.order(gateway.release(small_adapter(2), 2), rollout="r2")
    before = Trust(home / "trust", who.root).state
    engine = SmallEngine()
    rng = random.Random(1)  # noqa: S311
    keeper = Keeper(home, who, now=lambda: datetime.now(UTC), backoff=Backoff(rng, 0.01, 0.05))
    with Running(home, engine, connect=lambda _: keeper.connect()) as running:
        gateway.heard(DeviceEvent.COMMITTED, "stable-2", rollout="r2")
        running.serves("stable-2")
        until(lambda: running.queue.pending() == 0, what="all reports to be delivered")
    told = gateway.reports()
    assert [one.sequence for one in told] == list(range(1, len(told) + 1)), "none is lost"
    started = [one.release for one in told if one.event is DeviceEvent.STARTED]
    assert started == ["", "stable-1"], "served what it had before any link"
    committed = [one.release for one in told if one.event is DeviceEvent.COMMITTED]
    assert committed == ["stable-1", "stable-2"]
    assert keeper.who.life[1] > datetime.now(UTC) + timedelta(days=20), "renewed by its key"
    assert Trust(home / "trust", who.root).state.time_floor > before.time_floor
