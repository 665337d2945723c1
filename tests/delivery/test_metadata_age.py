"""How long a device has lacked newer metadata: by what it says, and by what it was sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from federation.metadata_age import Dates
from federation.store import Store

HOUR = 3600.0


def device(name: str, version: int) -> dict[str, object]:
    return {"id": name, "timestamp_version": version}


@pytest.fixture
def now() -> list[float]:
    return [1_000_000.0]


@pytest.fixture
def store(tmp_path: Path, now: list[float]):
    made = Store.open(tmp_path / "fleet.sqlite", lambda: now[0])
    yield made
    made.close()


def test_a_device_that_is_held_back_is_named(store: Store, now: list[float]) -> None:
    dates = Dates(store)
    for version in (4, 5, 6):
        dates.note(version)
        dates.note(version)
        now[0] += 6 * HOUR
    dates.sent("fresh", 6)
    dates.sent("held", 4)
    assert dates.hours(device("fresh", 1)) == 0.0, "what it was sent counts"
    assert dates.hours(device("held", 6)) == 12.0, "and so does what it says it has"
    assert dates.hours(device("away", 5)) == 6.0
    assert dates.hours(device("never seen", 0)) is None
    assert dates.hours(device("ahead", 99)) == 0.0
    again = Dates(store)  # after a restart
    assert again.hours(device("away", 4)) == 12.0


def test_numbers_that_begin_anew(store: Store, now: list[float]) -> None:
    dates = Dates(store)
    dates.note(2**31 + 7)
    now[0] += HOUR
    dates.note(1)
    now[0] += HOUR
    dates.note(2)
    now[0] += HOUR
    assert dates.hours(device("one", 1)) == 1.0
    assert dates.hours(device("two", 2)) == 0.0


def test_long_ago_is_forgotten(store: Store, now: list[float]) -> None:
    dates = Dates(store)
    dates.note(1)
    now[0] += 500 * 24 * HOUR
    dates.note(2)
    now[0] += HOUR
    dates.note(3)
    assert dates.hours(device("one", 1)) == 1.0
