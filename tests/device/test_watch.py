"""Windows, locks, and the watch over a release on probation, on clocks that the test moves."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.durable import StorageError
from clients.device_settings import DeviceError, DeviceSettings
from clients.health import unfit
from clients.permission import Permission
from clients.watch import HealthWatch, Vitals, WatchPolicy
from protos.errors import WireError
from protos.members import MAX_MEMBERS, check_members, is_member, pack_members
from protos.messages import Health
from protos.signed import Assignment, RoundDocument, StatementError
from protos.window import DAY, Window

NOON = datetime(2026, 5, 1, 12, 0, 30, tzinfo=UTC)
POLICY = WatchPolicy(strikes=2, starts=2)
BEFORE = Vitals(10**9, 10.0)


def permission(home: Path, **fields: object) -> Permission:
    return Permission(home, now=lambda: NOON, **{"zone": UTC, **fields})  # type: ignore[arg-type]


def test_the_window_is_read_in_the_devices_own_time(tmp_path: Path) -> None:
    night = "22:00-05:00"
    assert permission(tmp_path).wait("") is None
    closed = permission(tmp_path).wait(night)
    assert closed is not None
    assert closed.seconds == 10 * 3600 - 30
    tokyo = permission(tmp_path, zone=ZoneInfo("Asia/Tokyo"))  # 21:00
    assert tokyo.wait(night).seconds == 3600 - 30  # type: ignore[union-attr]
    assert permission(tmp_path, zone=ZoneInfo("Pacific/Auckland")).wait(night) is None  # midnight


@given(st.integers(0, DAY - 1), st.integers(0, DAY - 1), st.integers(0, DAY - 1))
def test_a_window_opens_within_a_day_and_then_is_open(begins: int, ends: int, now: int) -> None:
    if begins == ends:
        return
    window = Window(begins, ends)
    assert Window.parse(str(window)) == window
    opens = window.opens_in(now)
    assert 0 <= opens < DAY
    assert window.opens_in((now + opens) % DAY) == 0
    assert window.opens_in(ends) > 0, "the end is no longer inside"


@pytest.mark.parametrize("text", ["", "22-05", "24:00-05:00", "05:00-05:00", "22:00-05:00 ", 7])
def test_what_is_no_window_is_refused(text: object) -> None:
    with pytest.raises(WireError, match="window"):
        Window.parse(text)  # type: ignore[arg-type]


def test_a_lock_file_or_a_command_holds_the_install(tmp_path: Path) -> None:
    (tmp_path / "update.lock").touch()
    held = permission(tmp_path, ask_again_seconds=7.0).wait("")
    assert held is not None
    assert (held.seconds, held.why) == (7.0, "update.lock is there")
    (tmp_path / "update.lock").unlink()
    for code in (0, 3):
        command = ("sh", "-c", f"exit {code}")
        answer = permission(tmp_path, command=command).wait("")
        assert (answer is None) == (code == 0)
    gone = permission(tmp_path, command=("/no/such/command",)).wait("")
    assert gone is not None
    assert "does not answer" in gone.why


def test_the_settings_name_a_zone_that_is_none(tmp_path: Path) -> None:
    assert DeviceSettings.read(tmp_path, {"time_zone": "Asia/Tokyo"}).zone == ZoneInfo("Asia/Tokyo")
    for wrong in ("Mars/Olympus", "../../etc/passwd"):
        with pytest.raises(DeviceError, match="not the name of a time zone"):
            DeviceSettings.read(tmp_path, {"time_zone": wrong})


class Bed:
    """A device on the bench: its vitals, its clock, and what was reverted."""

    def __init__(self, home: Path) -> None:
        self.home, self.now, self.vitals = home, NOON, BEFORE
        self.reverted: list[tuple[str, str]] = []
        self.watch = self.start_again()

    def start_again(self) -> HealthWatch:
        self.watch = HealthWatch(
            self.home,
            vitals=lambda: self.vitals,
            revert=lambda sha256, why: self.reverted.append((sha256, why)),
            policy=POLICY,
            now=lambda: self.now,
        )
        return self.watch


def test_one_bad_look_is_no_verdict_and_two_in_a_row_are(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.watch.begin("aa", BEFORE, 600.0)
    for vitals in (Vitals(10**10, 10.0), BEFORE, Vitals(10**10, 10.0)):
        bed.vitals = vitals
        bed.watch.look()
    assert bed.reverted == []
    bed.vitals = Vitals(10**9, 900.0)
    bed.watch.look()
    assert bed.reverted == [("aa", "a request takes 900.0 ms after 10.0 ms")]
    assert bed.watch.watched is None
    assert not (tmp_path / "watch.json").exists()


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (Vitals(10**9, 10.0, 60.0), Vitals(10**9, 10.0, 90.0), "90 °C after 60.0 °C"),
        (Vitals(10**9, 10.0, None), Vitals(10**9, 10.0, 90.0), "90 °C after None"),
        (Vitals(10**9, 10.0, 86.0), Vitals(10**9, 10.0, 90.0), ""),
        (Vitals(10**9, 10.0, 60.0), Vitals(10**9, 10.0, None), ""),
        (Vitals(10**9, 10.0, None, 1.0), Vitals(10**9, 10.0, None, 4.1), "load is 4.10 after 1.00"),
        (Vitals(10**9, 10.0, None, 2.0), Vitals(10**9, 10.0, None, 4.1), ""),
    ],
)
def test_heat_and_load_where_they_are_asked_for(
    tmp_path: Path, before: Vitals, after: Vitals, word: str
) -> None:
    settings = {"max_temperature_celsius": 85.0, "max_load_rise": 3.0}
    bed = Bed(tmp_path)
    bed.watch._policy = replace(DeviceSettings.read(tmp_path, settings).watch, strikes=2)
    bed.watch.begin("aa", before, 600.0)
    bed.vitals = after
    bed.watch.look()
    bed.watch.look()
    assert (word in bed.reverted[0][1]) if word else not bed.reverted
    bed.watch._policy = DeviceSettings.read(tmp_path, {}).watch
    assert bed.watch._complaint(before, after) == "", "not asked for"


def test_a_battery_that_is_nearly_empty_holds_an_install(tmp_path: Path) -> None:
    health = Health(
        memory_available_bytes=1, process_memory_bytes=1, disk_free_bytes=1, load_1min=0.0
    )
    for percent, held in ((19, True), (20, False), (None, False)):
        now = replace(health, battery_percent=percent)
        one = permission(tmp_path, unfit=lambda now=now: unfit(now, min_battery_percent=20))
        assert (one.wait("") is not None) == held


def test_a_revert_that_the_disk_did_not_take_is_made_good_at_the_next_look(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.watch.begin("aa", BEFORE, 600.0)

    def full(sha256: str, why: str) -> None:
        raise StorageError("the disk is full")

    revert, bed.watch._revert = bed.watch._revert, full
    bed.vitals = Vitals(10**10, 10.0)
    bed.watch.look()
    with pytest.raises(StorageError):
        bed.watch.look()
    bed.watch._revert, bed.vitals = revert, BEFORE
    bed.watch.look()
    assert [sha256 for sha256, _ in bed.reverted] == ["aa"]


def test_after_the_bake_nothing_is_held_against_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.watch.begin("aa", BEFORE, 600.0)
    bed.vitals = Vitals(10**10, 10.0)
    bed.watch.look()
    bed.now += timedelta(seconds=600)
    bed.watch.look()
    assert (bed.reverted, bed.watch.watched) == ([], None)


def test_a_clock_that_is_set_back_far_ends_the_bake(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.watch.begin("aa", BEFORE, 600.0)
    bed.now -= timedelta(days=365)
    bed.watch.look()
    assert bed.watch.watched is None


def test_a_crash_loop_within_the_bake_goes_back(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.watch.begin("aa", BEFORE, 600.0)
    for _ in range(2):
        bed.start_again().resume("aa")
    assert bed.reverted == []
    bed.start_again().resume("aa")
    assert bed.reverted == [("aa", "3 starts of the process within the bake")]


def test_a_kill_before_the_commit_or_in_the_revert_is_made_good(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.watch.begin("aa", BEFORE, 600.0)
    bed.start_again().resume("bb")  # killed before the commit: another release is the active one
    assert (bed.reverted, bed.watch.watched) == ([], None)

    def killed(sha256: str, why: str) -> None:
        raise KeyboardInterrupt

    bed.watch.begin("aa", BEFORE, 600.0)
    bed.watch._revert = killed
    bed.vitals = Vitals(10**10, 10.0)
    bed.watch.look()
    with pytest.raises(KeyboardInterrupt):
        bed.watch.look()
    bed.start_again().resume("bb")  # the slot is back already, the report is not
    assert [sha256 for sha256, _ in bed.reverted] == ["aa"]
    (tmp_path / "watch.json").write_text("{")
    assert bed.start_again().watched is None


def test_a_round_names_members_and_an_older_device_must_not_overlook_them() -> None:
    packed = pack_members("s", ["d-1", "d-2"])
    target = ("adapters/stable/1.airpeft", "11" * 32)
    one = RoundDocument(
        sequence=1,
        rollout="r-1",
        salt="s",
        assignments=(Assignment(10_000, *target, packed), Assignment(10_000)),
        window="22:00-05:00",
        bake_seconds=60,
    )
    assert RoundDocument.from_custom(one.to_custom()) == one
    assert one.to_custom()["critical"] == ["members", "window"]
    assert one.assignment_of("d-2").target == target[0]  # type: ignore[union-attr]
    assert one.assignment_of("d-3").is_base  # type: ignore[union-attr]
    plain = RoundDocument(sequence=1, rollout="r-1", salt="s")
    assert "critical" not in plain.to_custom()
    for field in ({"window": "never"}, {"bake_seconds": -1}, {"window": 7}):
        with pytest.raises(StatementError):
            RoundDocument.from_custom({**plain.to_custom(), **field})
    for members in ("x", "AAAA", "A" * 200_000, 5):
        with pytest.raises(WireError, match="members"):
            check_members(members)
        with pytest.raises(StatementError):
            Assignment(1, *target, members)  # type: ignore[arg-type]


@given(st.sets(st.text(max_size=8), max_size=40), st.text(max_size=8))
def test_members_are_those_that_were_packed(names: set[str], other: str) -> None:
    packed = pack_members("salt", names)
    assert check_members(packed) == packed
    assert all(is_member(packed, "salt", name) for name in names)
    assert is_member(packed, "salt", other) == (other in names)


def test_too_many_members_are_refused() -> None:
    with pytest.raises(WireError, match="at most 20000"):
        pack_members("s", map(str, range(MAX_MEMBERS + 1)))
