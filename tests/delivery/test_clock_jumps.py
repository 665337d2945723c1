"""The server's clock is set, forth or back, while rollouts are under way and devices are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from federation.clock_jumps import ClockJumps, pause_after, uptime
from federation.fleet import Fleet
from federation.rollout import State, Verb
from protos.messages import DeviceEvent, RejectReason
from tests.delivery.test_ticker import FOUR, House, roll_out
from tests.trust.fleet_of_one import Device, Publisher

YEAR = 365 * 86_400.0


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "home")
    made.enrol(*FOUR)
    yield made
    made.store.close()


def test_what_keeps_a_clock_right_is_no_jump() -> None:
    wall, steady = [1000.0], [5.0]
    jumps = ClockJumps(lambda: wall[0], lambda: steady[0])
    for seconds, set_by, jump in ((60.0, 0.0, 0.0), (9.0, 3.0, 3.0), (1.0, -500.0, -500.0)):
        wall[0] += seconds + set_by
        steady[0] += seconds
        assert jumps.newest() == pytest.approx(jump)
    assert uptime() <= uptime()


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_a_jump_of_the_servers_clock_pauses_what_is_under_way(house: House, jump: float) -> None:
    steady = [0.0]
    jumps = ClockJumps(lambda: house.now[0], lambda: steady[0])
    rollout = roll_out(house, house.publish(1))
    assert house.ticker.record(rollout.id).rollout.state is State.RUNNING
    house.now[0] += jump
    pause_after(jumps.newest(), house.ticker)
    house.ticker.tick()
    paused = house.ticker.record(rollout.id).rollout
    assert paused.state is State.PAUSED
    assert f"clock was set {'forth' if jump > 0 else 'back'} by 31536000 s" in paused.why
    assert any("clock was set" in line["why"] for line in house.store.audit())
    (canary,) = [name for name in FOUR if house.told(name) == "stable-1"]
    house.say(canary, DeviceEvent.COMMITTED, release="stable-1", rollout=rollout.id)
    house.now[0] -= jump
    pause_after(jumps.newest(), house.ticker)
    house.ticker.act(rollout.id, Verb.RESUME, who="ann")
    house.ticker.tick()
    assert house.ticker.record(rollout.id).rollout.state is State.RUNNING
    assert house.ticker.record(rollout.id).rollout.wave == 1, "what was heard meanwhile counts"


def test_a_server_that_starts_with_its_clock_ahead_admits_devices_when_it_is_right(
    house: House,
) -> None:
    serials = {row["id"]: row["serial"] for row in house.fleet.devices()}
    house.now[0] += 60 * 86_400.0
    started = Fleet(house.store)
    assert not any(started.admits(name, serial) for name, serial in serials.items())
    house.now[0] -= 60 * 86_400.0
    assert all(started.admits(name, serial) for name, serial in serials.items())


def test_a_clock_set_back_dates_nothing_back(house: House) -> None:
    house.ticker.tick()
    before = house.repository.versions()["timestamp"], house.repository.bundle().files
    house.now[0] -= YEAR
    house.ticker.tick()
    assert (house.repository.versions()["timestamp"], house.repository.bundle().files) == before
    house.now[0] += YEAR
    house.ticker.tick()
    assert house.repository.bundle().files == before[1]


def test_devices_wait_until_time_has_caught_up_with_what_was_signed(tmp_path: Path) -> None:
    """They can't know that the server was wrong; they serve on, and install nothing meanwhile."""
    publisher = Publisher(tmp_path / "server")
    publisher.order(publisher.release(1))
    device = Device(tmp_path / "device", publisher)
    device.installs()
    right = publisher.now
    publisher.later(days=3)
    publisher.refresh()
    device.accept(now=right)
    publisher.now = right
    publisher.later(hours=1)
    publisher.order(publisher.release(2))
    assert device.reason() is RejectReason.METADATA_EXPIRED
    publisher.later(days=3)
    publisher.refresh()
    assert device.installs().name == "stable-2"
