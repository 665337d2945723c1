"""Devices told at a rate: never too many in a minute, nobody let go, and it ends."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.orders import Observation, Target
from federation.planning import duration
from federation.policy import Policy
from federation.rate import Counting, Rate, allowance, seconds_needed
from federation.rollout import Rollout, State, Verb, act, decide
from federation.waves import RolloutError, Wave
from protos.messages import DeviceEvent, bucket

NEW = Target("stable-2", "adapters/stable/2.airpeft", "22" * 32)
OTHER = Target("stable-3", "adapters/stable/3.airpeft", "33" * 32)
OLD = Target("stable-1", "adapters/stable/1.airpeft", "11" * 32)
SALT = "r-1-0"  # what choose_salt takes for a single wave of 100%


def crowd(size: int) -> list[str]:
    """Names of which many share a bucket, as in a fleet far larger than there are buckets."""
    places: dict[int, list[str]] = defaultdict(list)
    for number in range(3000):
        places[bucket(SALT, f"d-{number}")].append(f"d-{number}")
    groups = sorted(places.values(), key=len, reverse=True)
    return sorted([name for group in groups for name in group][:size])


CROWD = crowd(60)

rates = st.builds(
    lambda base, factor, every, counting, extra: Rate(
        per_minute=base,
        factor=factor,
        every=every if factor > 1 else 0,
        counting=counting,
        max_per_minute=base + extra,
    ),
    base=st.integers(1, 90),
    factor=st.sampled_from([1.0, 1.1, 2.0, 5.0]),
    every=st.integers(1, 20),
    counting=st.sampled_from(list(Counting)),
    extra=st.integers(0, 200),
)


def start(rate: Rate, *waves: str, names: list[str] = CROWD, compare: bool = False, **policy):  # type: ignore[no-untyped-def]
    rollout = Rollout(
        id="r-1",
        release=NEW,
        other=OTHER if compare else None,
        previous=OLD,
        waves=tuple(Wave.parse(wave) for wave in waves or ("100%",)),
        policy=Policy(rate=rate, **policy),
    )
    known = {name: Observation(device_id=name, facts={"id": name}) for name in names}
    return act(rollout, Verb.START, list(known.values()), 0.0, who="ann").rollout, known


def commit(known: dict[str, Observation], rollout: Rollout, names: list[str]) -> None:
    for name in names:
        if name in known and rollout.includes(name):
            release = rollout.targets[rollout.arm(name)].release
            known[name] = replace(known[name], outcome=DeviceEvent.COMMITTED, running=release)


@settings(max_examples=50, deadline=None)
@given(
    rate=rates,
    waves=st.sampled_from([("100%",), ("3", "50%", "100%"), ('4 where id ~ "d-1*"', "100%")]),
    compare=st.booleans(),
    waits=st.lists(st.floats(0.1, 300.0), min_size=1, max_size=12),
    obedient=st.integers(1, 60),
)
def test_never_more_in_a_minute_than_the_rate_nobody_is_let_go_and_it_ends(
    rate: Rate, waves: tuple[str, ...], compare: bool, waits: list[float], obedient: int
) -> None:
    rollout, known = start(rate, *waves, compare=compare, deadline_seconds=500.0)
    now, told, before = 0.0, [(0.0, rollout.notified)], set[str]()
    for step in range(2000):
        inside = {name for name in known if rollout.includes(name)}
        assert before <= inside, "somebody was let go"
        assert len(inside) == rollout.notified, "reached without being counted, or the reverse"
        before = inside
        if rollout.state is not State.RUNNING:
            break
        commit(known, rollout, CROWD[:obedient])
        now += waits[step % len(waits)] if step < 40 else 30.0
        good = sum(one.committed for one in known.values())
        after = decide(rollout, list(known.values()), now).rollout
        assert Rollout.from_mapping(after.to_mapping()) == after
        if after.notified > rollout.notified:
            allowed = rate.now(rollout.notified, good)
            told.append((now, after.notified - rollout.notified))
            assert sum(count for at, count in told if now - at < 60.0) <= allowed
        rollout = after
    assert rollout.state is not State.RUNNING, "it does not end"
    if rollout.state is State.DONE:
        assert before == set(CROWD)
        assert rollout.members == () or waves[0].startswith("4 where")


def test_a_large_fleet_goes_at_the_rate_and_no_slower_than_the_plan_says() -> None:
    names = [f"d-{number}" for number in range(200)]
    rate = Rate(per_minute=30, factor=2.0, every=60, max_per_minute=120)
    rollout, known = start(rate, names=names)
    now = 0.0
    while rollout.goal is not None:
        now += 1.0
        rollout = decide(rollout, list(known.values()), now).rollout
    assert now == pytest.approx(seconds_needed(rate, [200])[0], abs=2.0)
    assert now == pytest.approx(60 * (60 / 30 + 60 / 60 + 80 / 120), abs=30.0)


def test_both_sides_of_a_comparison_grow_at_the_same_pace() -> None:
    names = [f"d-{number}" for number in range(100)]
    rollout, known = start(Rate(per_minute=60), names=names, compare=True)
    for now in range(10, 50, 10):
        rollout = decide(rollout, list(known.values()), float(now)).rollout
        arms = [rollout.arm(name) for name in names if rollout.includes(name)]
        assert abs(arms.count(0) - arms.count(1)) <= 8


def test_the_deadline_runs_from_the_last_device_that_was_told_not_from_the_first() -> None:
    rollout, known = start(Rate(per_minute=1), names=CROWD[:4], deadline_seconds=100.0)
    for now in (60.0, 120.0, 180.0):
        commit(known, rollout, CROWD)
        rollout = decide(rollout, list(known.values()), now).rollout
    assert rollout.goal is None
    assert decide(rollout, list(known.values()), 270.0).rollout.state is State.RUNNING
    assert decide(rollout, list(known.values()), 280.0).rollout.state is State.DONE


def test_a_pause_stops_the_telling_and_a_failure_halts_between_two_batches() -> None:
    rollout, known = start(Rate(per_minute=6))
    held = act(rollout, Verb.PAUSE, list(known.values()), 5.0).rollout
    assert decide(held, list(known.values()), 500.0).rollout == held
    going = act(held, Verb.RESUME, list(known.values()), 500.0).rollout
    going = decide(going, list(known.values()), 500.0).rollout
    assert going.notified == rollout.notified + 2, "what a pause withheld is not made up for"
    name = next(name for name in known if going.includes(name))
    known[name] = replace(known[name], outcome=DeviceEvent.REVERTED)
    assert decide(going, list(known.values()), 501.0).rollout.state is State.HALTED


def test_a_clock_that_was_set_back_does_not_stop_it() -> None:
    rollout, known = start(Rate(per_minute=6))
    ahead = decide(rollout, list(known.values()), 86_400.0).rollout
    back = decide(ahead, list(known.values()), 100.0).rollout
    assert back.notified == ahead.notified
    assert decide(back, list(known.values()), 200.0).rollout.notified > back.notified


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"per_minute": 0}, "per_minute"),
        ({"per_minute": 1, "factor": 0.5}, "factor"),
        ({"per_minute": 1, "factor": 2.0}, "every"),
        ({"per_minute": 1, "every": 5}, "every"),
        ({"per_minute": 9, "factor": 2.0, "every": 5, "max_per_minute": 8}, "max_per_minute"),
    ],
)
def test_an_impossible_rate_is_refused_by_its_field(fields: dict[str, float], named: str) -> None:
    with pytest.raises(RolloutError, match=f"rate.{named}"):
        Rate(**fields)  # type: ignore[arg-type]


def test_growth_has_no_overflow() -> None:
    rate = Rate(per_minute=1, factor=10.0, every=1, max_per_minute=100_000)
    assert rate.now(10**9, 0) == 100_000
    assert allowance(100_000, (), 0.0) == 16_666


def test_how_long_a_plan_takes_at_least_and_at_most() -> None:
    policy = Policy(rate=Rate(per_minute=6), bake_seconds=100.0, deadline_seconds=1000.0)
    found = duration(policy, [1, 6])
    assert found.telling == (0.0, 60.0)
    assert found.at_least == 60.0 + 2 * 100.0
    assert found.at_most == 60.0 + 2 * (100.0 + 1000.0)
    assert duration(Policy(), [1, 6]).at_least == 0.0
