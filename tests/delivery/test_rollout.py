"""The rollout's state machine: the table in its docstring, and what must hold in every history."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.orders import BASE, Observation, Orders, Target
from federation.policy import OnSuccess, Policy, Retries
from federation.rollout import ALLOWED, Rollout, State, Verb, act, decide
from federation.standing import standing
from federation.waves import RolloutError, Wave, choose_salt, parse_plan, reach
from protos.messages import DeviceEvent, Health, Quality, RejectReason, bucket

NEW = Target("stable-2", "adapters/stable/2.airpeft", "22" * 32)
OLD = Target("stable-1", "adapters/stable/1.airpeft", "11" * 32)
FLEET = [f"d-{number}" for number in range(20)]


def plan(*waves: str, previous: Target = OLD, **policy: object) -> Rollout:
    return Rollout(
        id="r-1",
        release=NEW,
        previous=previous,
        waves=tuple(Wave.parse(wave) for wave in waves or ("1", "25%", "100%")),
        policy=Policy(**policy),  # type: ignore[arg-type]
    )


def silent(devices: list[str] = FLEET) -> dict[str, Observation]:
    return {name: Observation(device_id=name, running=OLD.release) for name in devices}


def answer(
    known: dict[str, Observation], rollout: Rollout, event: DeviceEvent, **fields: object
) -> None:
    """Every device of the wave that has said nothing yet says this."""
    for name, one in known.items():
        if rollout.includes(name) and one.outcome is None:
            running = NEW.release if event is DeviceEvent.COMMITTED else one.running
            known[name] = replace(one, outcome=event, running=running, **fields)  # type: ignore[arg-type]


def step(rollout: Rollout, known: dict[str, Observation], now: float):
    return decide(rollout, list(known.values()), now)


def started(rollout: Rollout, known: dict[str, Observation], now: float = 0.0) -> Rollout:
    return act(rollout, Verb.START, list(known.values()), now, who="ann").rollout


def told(orders: Orders, device: str) -> Target | None:
    """What a device that hears these orders takes."""
    place = bucket(orders.salt, device)
    return next((a.target for a in orders.assignments if place < a.basis_points), None)


def test_canary_then_quarter_then_everybody() -> None:
    known = silent()
    decision = act(plan(), Verb.START, list(known.values()), 0.0)
    reached = []
    for _ in range(3):
        rollout, orders = decision.rollout, decision.orders
        assert orders is not None
        got = [name for name in FLEET if told(orders, name) == NEW]
        reached.append(len(got))
        assert all(told(orders, name) == OLD for name in FLEET if name not in got)
        assert step(rollout, known, 1.0).rollout == rollout, "advanced without an answer"
        answer(known, rollout, DeviceEvent.COMMITTED)
        decision = step(rollout, known, 2.0)
    assert reached == [1, 5, 20]
    assert decision.rollout.state is State.DONE


def test_bake_time_is_waited_for() -> None:
    known = silent()
    rollout = started(plan(bake_seconds=60.0), known)
    answer(known, rollout, DeviceEvent.COMMITTED)
    rollout = step(rollout, known, 100.0).rollout
    assert (rollout.wave, rollout.settled_at) == (0, 100.0)
    assert step(rollout, known, 159.0).rollout.wave == 0
    assert step(rollout, known, 160.0).rollout.wave == 1


@pytest.mark.parametrize("event", [DeviceEvent.REVERTED, DeviceEvent.REJECTED, DeviceEvent.FAILED])
def test_a_failed_canary_halts_and_rolls_back(event: DeviceEvent) -> None:
    known = silent()
    rollout = started(plan(), known)
    answer(known, rollout, event, reason=RejectReason.QUALITY_REGRESSED)
    halted = step(rollout, known, 1.0)
    assert halted.rollout.state is State.HALTED
    assert "quality-regressed" in halted.line
    back = step(halted.rollout, known, 1.0)
    assert back.rollout.state is State.ROLLING_BACK
    assert back.orders is not None
    assert {told(back.orders, name) for name in FLEET} == {OLD}
    assert step(back.rollout, known, 1.0).rollout.state is State.ROLLED_BACK


def test_roll_back_without_a_release_before_goes_to_the_base() -> None:
    known = silent()
    rollout = started(plan(previous=BASE), known)
    back = act(rollout, Verb.ROLLBACK, list(known.values()), 5.0)
    assert back.orders is not None
    assert told(back.orders, "d-3") == BASE


def test_allowed_failures_do_not_halt_but_a_wave_without_any_commit_pauses() -> None:
    known = silent()
    rollout = started(plan("2", "100%", max_failures=1, retries=Retries(device=0)), known)
    names = [name for name in FLEET if rollout.includes(name)]
    known[names[0]] = replace(known[names[0]], outcome=DeviceEvent.FAILED)
    known[names[1]] = replace(known[names[1]], outcome=DeviceEvent.COMMITTED, running=NEW.release)
    assert step(rollout, known, 1.0).rollout.wave == 1
    alone = started(plan("1", "100%", max_failures=1, retries=Retries(device=0)), silent())
    known = silent()
    answer(known, alone, DeviceEvent.FAILED)
    assert step(alone, known, 1.0).rollout.state is State.PAUSED


def test_a_refusal_that_speaks_of_the_clock_is_not_the_releases_fault() -> None:
    known = silent()
    rollout = started(plan(), known)
    answer(known, rollout, DeviceEvent.REJECTED, reason=RejectReason.CLOCK)
    assert step(rollout, known, 1.0).rollout == rollout


def test_a_fall_that_is_shown_halts_though_every_device_committed() -> None:
    known = silent()
    rollout = started(plan("100%", quality_tolerance=0.01), known)
    quality = Quality(examples=10, accuracy_before=0.80, accuracy_after=0.70)
    answer(known, rollout, DeviceEvent.COMMITTED, quality=quality)
    halted = step(rollout, known, 1.0)
    assert halted.rollout.state is State.HALTED
    assert "falls by 0.1000 on 19 devices (1 more left out" in halted.line
    # and then it waits for those that run it to come back, at most for the deadline
    back = step(halted.rollout, known, 2.0).rollout
    assert step(back, known, 3.0).rollout.state is State.ROLLING_BACK
    returned = {name: replace(one, running=OLD.release) for name, one in known.items()}
    assert step(back, returned, 3.0).rollout.state is State.ROLLED_BACK
    assert step(back, known, 2.0 + 3600).rollout.state is State.ROLLED_BACK


def test_a_fall_on_too_few_devices_to_tell_does_not_halt() -> None:
    known = silent()
    rollout = started(plan("4", "100%", quality_tolerance=0.01), known)
    quality = Quality(examples=10, accuracy_before=0.80, accuracy_after=0.70)
    answer(known, rollout, DeviceEvent.COMMITTED, quality=quality)
    assert step(rollout, known, 1.0).rollout.wave == 1


def test_a_margin_asks_for_proof_before_the_next_wave() -> None:
    known = silent()
    rollout = started(plan("15", "100%", quality_margin=0.05, liar_share=0.0), known)
    names = [name for name in FLEET if rollout.includes(name)]
    for name in names:
        known[name] = replace(known[name], outcome=DeviceEvent.COMMITTED, running=NEW.release)
    paused = step(rollout, known, 1.0).rollout
    assert paused.state is State.PAUSED
    assert "not shown that accuracy falls by less than 0.05" in paused.why
    good = Quality(examples=10, accuracy_before=0.80, accuracy_after=0.82)
    for name in names:
        known[name] = replace(known[name], quality=good)
    resumed = act(paused, Verb.RESUME, list(known.values()), 2.0).rollout
    assert step(resumed, known, 3.0).rollout.wave == 1


def test_devices_that_are_worse_off_halt() -> None:
    known = silent()
    rollout = started(plan("5", "100%", max_unhealthy=1, max_memory_factor=2.0), known)
    before = Health(
        memory_available_bytes=1, process_memory_bytes=10**9, disk_free_bytes=1, load_1min=0.0
    )
    after = replace(before, process_memory_bytes=3 * 10**9)
    names = [name for name in FLEET if rollout.includes(name)]
    for name in names[:1]:
        known[name] = replace(
            known[name], outcome=DeviceEvent.COMMITTED, health_before=before, health_after=after
        )
    assert step(rollout, known, 1.0).rollout.state is State.RUNNING
    slow = Quality(
        examples=5,
        accuracy_before=0.5,
        accuracy_after=0.5,
        latency_ms_before=9.0,
        latency_ms_after=999.0,
    )
    known[names[1]] = replace(known[names[1]], outcome=DeviceEvent.COMMITTED, quality=slow)
    halted = step(rollout, known, 2.0)
    assert "2 devices are worse off (latency, memory), 1 allowed" in halted.line


def test_a_failure_counts_when_its_class_may_not_try_again() -> None:
    known = silent()
    rollout = started(plan(retries=Retries(device=1, space=3)), known)
    name = next(name for name in FLEET if rollout.includes(name))
    tries = [
        (DeviceEvent.FAILED, None, 1, State.RUNNING),
        (DeviceEvent.FAILED, RejectReason.NO_SPACE, 3, State.RUNNING),
        (DeviceEvent.FAILED, None, 2, State.HALTED),
        (DeviceEvent.REJECTED, RejectReason.GUARD, 1, State.HALTED),
    ]
    for event, reason, attempts, state in tries:
        known[name] = replace(known[name], outcome=event, reason=reason, attempts=attempts)
        assert step(rollout, known, 1.0).rollout.state is state, reason


def test_nothing_goes_beyond_the_canary_without_a_second_operator() -> None:
    known = silent()
    rollout = started(plan(two_person=True), known)
    answer(known, rollout, DeviceEvent.COMMITTED)
    waiting = step(rollout, known, 1.0).rollout
    assert waiting.state is State.AWAITING_APPROVAL
    assert step(waiting, known, 1e6).rollout == waiting
    for who in ("ann", ""):
        with pytest.raises(RolloutError, match="started by ann: another operator must approve"):
            act(waiting, Verb.APPROVE, list(known.values()), 2.0, who=who)
    approved = act(waiting, Verb.APPROVE, list(known.values()), 2.0, who="ben").rollout
    assert approved.approved_by == "ben"
    second = step(approved, known, 3.0).rollout
    assert (second.state, second.wave) == (State.RUNNING, 1)
    answer(known, second, DeviceEvent.COMMITTED)
    assert step(second, known, 4.0).rollout.wave == 2, "one approval is enough"
    with pytest.raises(RolloutError, match="give a smaller wave"):
        plan("100%", two_person=True)


def test_a_success_can_pause_and_resume_begins_the_next_wave() -> None:
    known = silent()
    rollout = started(plan(on_success=OnSuccess.PAUSE, bake_seconds=5.0), known)
    for wave in (0, 1):
        answer(known, rollout, DeviceEvent.COMMITTED)
        rollout = step(step(rollout, known, 1.0).rollout, known, 6.0).rollout
        assert (rollout.state, rollout.held, rollout.wave) == (State.PAUSED, True, wave)
        rollout = act(rollout, Verb.RESUME, list(known.values()), 7.0).rollout
        rollout = step(rollout, known, 7.0).rollout
    answer(known, rollout, DeviceEvent.COMMITTED)
    rollout = step(step(rollout, known, 8.0).rollout, known, 13.0).rollout
    assert rollout.state is State.DONE, "there is nothing to hold after the last wave"


def test_too_few_successes_pause() -> None:
    known = silent()
    rollout = started(plan("4", "100%", min_success_share=0.75, deadline_seconds=10.0), known)
    for name in [name for name in FLEET if rollout.includes(name)][:2]:
        known[name] = replace(known[name], outcome=DeviceEvent.COMMITTED, running=NEW.release)
    paused = step(rollout, known, 10.0).rollout
    assert paused.why == "wave 1: 2 of 4 devices run the release, 75% asked for"


def test_a_window_gives_every_time_zone_its_day() -> None:
    known = silent()
    rollout = started(plan(window="22:00-05:00", deadline_seconds=100.0), known)
    assert step(rollout, known, 86_499.0).rollout.state is State.RUNNING
    assert step(rollout, known, 86_500.0).rollout.state is State.PAUSED


def test_filter_waves_pick_by_tags_and_never_let_go() -> None:
    known = {
        name: replace(one, facts={"tag.site": "north" if int(name[2:]) < 6 else "south"})
        for name, one in silent().items()
    }
    north = {name for name in FLEET if int(name[2:]) < 6}
    words = ('2 where tag.site == "north"', 'where tag.site == "north"', "8", "100%")
    decision = act(plan(*words), Verb.START, list(known.values()), 0.0, who="ann")
    reached: list[set[str]] = []
    while decision.rollout.state is State.RUNNING:
        rollout, orders = decision.rollout, decision.orders
        assert orders is not None
        document = orders.to_document(1, rollout.id)
        got = {name for name in FLEET if document.assignment_of(name).target == NEW.path}
        assert got == {name for name in FLEET if rollout.includes(name)}
        reached.append(got)
        answer(known, rollout, DeviceEvent.COMMITTED)
        decision = step(rollout, known, 1.0)
    assert [len(got & north) for got in reached[:2]] == [2, 6]
    assert reached[1] == north
    assert all(a <= b for a, b in itertools.pairwise(reached)), "somebody was let go"
    assert reached[3] == set(FLEET)
    assert decision.rollout.state is State.DONE


def test_a_comparison_keeps_its_sides_apart_while_both_grow() -> None:
    third = Target("stable-3", "adapters/stable/3.airpeft", "33" * 32)
    known = silent()
    rollout = replace(plan("4", "10", "100%"), other=third)
    decision = act(rollout, Verb.START, list(known.values()), 0.0, who="ann")
    sides: list[dict[str, str]] = []
    while decision.rollout.state is State.RUNNING:
        rollout, orders = decision.rollout, decision.orders
        assert orders is not None
        side = {}
        for name in FLEET:
            target = told(orders, name)
            assert target is not None
            if rollout.includes(name):
                assert target == rollout.targets[rollout.arm(name)]
                side[name] = target.release
            else:
                assert target == OLD
        sides.append(side)
        answer(known, rollout, DeviceEvent.COMMITTED)
        decision = step(rollout, known, 1.0)
    assert decision.rollout.state is State.DONE
    counts = [sorted(Counter(side.values()).values()) for side in sides]
    assert counts == [[2, 2], [5, 5], [10, 10]]
    for earlier, later in itertools.pairwise(sides):
        assert earlier.items() <= later.items(), "a device changed sides"
    assert Rollout.from_mapping(decision.rollout.to_mapping()) == decision.rollout


def test_a_silent_device_blocks_until_the_deadline_and_not_longer() -> None:
    known = silent()
    rollout = started(plan("5", "100%", deadline_seconds=100.0), known)
    first = next(name for name in FLEET if rollout.includes(name))
    known[first] = replace(known[first], outcome=DeviceEvent.COMMITTED, running=NEW.release)
    assert step(rollout, known, 99.0).rollout.wave == 0
    assert step(rollout, known, 100.0).rollout.wave == 1


def test_a_wholly_silent_canary_pauses_and_resume_gives_it_time() -> None:
    known = silent()
    rollout = started(plan(deadline_seconds=100.0), known)
    paused = step(rollout, known, 100.0).rollout
    assert paused.state is State.PAUSED
    resumed = act(paused, Verb.RESUME, list(known.values()), 500.0).rollout
    assert step(resumed, known, 599.0).rollout.state is State.RUNNING


def test_a_revoked_device_is_not_waited_for() -> None:
    known = silent()
    rollout = started(plan("2", "100%"), known)
    first, second = (name for name in FLEET if rollout.includes(name))
    known[first] = replace(known[first], outcome=DeviceEvent.COMMITTED, running=NEW.release)
    assert step(rollout, known, 1.0).rollout.wave == 0
    del known[second]  # what a revocation looks like from here
    assert step(rollout, known, 1.0).rollout.wave == 1


def test_a_pause_does_not_advance_but_still_brakes() -> None:
    known = silent()
    rollout = act(started(plan(), known), Verb.PAUSE, list(known.values()), 1.0).rollout
    committed = dict(known)
    answer(committed, rollout, DeviceEvent.COMMITTED)
    assert step(rollout, committed, 9.0).rollout == rollout
    answer(known, rollout, DeviceEvent.REVERTED)
    assert step(rollout, known, 9.0).rollout.state is State.HALTED


def test_abort_tells_everybody_to_stay() -> None:
    known = silent()
    aborted = act(started(plan(), known), Verb.ABORT, list(known.values()), 1.0, "wrong notes")
    assert aborted.orders is not None
    assert aborted.orders.assignments == ()
    assert "wrong notes" in aborted.orders.reason
    assert step(aborted.rollout, known, 1e9).rollout.state is State.ABORTED


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("verb", list(Verb))
def test_verbs_are_refused_outside_their_states(state: State, verb: Verb) -> None:
    rollout = replace(plan(), state=state, wave=-1 if state is State.DRAFT else 0, salt="s")
    known = list(silent().values())
    if state in ALLOWED[verb]:
        assert act(rollout, verb, known, 1.0, who="ben").rollout.state is not state
    else:
        with pytest.raises(RolloutError, match=f"cannot {verb} rollout r-1: it is {state}"):
            act(rollout, verb, known, 1.0)


def test_devices_that_were_not_reached_have_no_say() -> None:
    """A thousand may be enrolled beside a canary of one; a lie of theirs is not its failure."""
    known = silent()
    rollout = started(plan(quality_tolerance=0.01, liar_share=0.0), known)
    for name in FLEET:
        if not rollout.includes(name):
            known[name] = replace(
                known[name],
                outcome=DeviceEvent.REVERTED,
                reason=RejectReason.QUALITY_REGRESSED,
                quality=Quality(examples=50, accuracy_before=1.0, accuracy_after=0.0),
            )
    assert step(rollout, known, 1.0).rollout.state is State.RUNNING
    shown = standing(rollout, list(known.values()), {})
    assert (shown["progress"]["failed"], shown["evidence"][0]["devices"]) == (0, 0)


def test_a_wave_that_an_operator_let_pass_is_not_held_again() -> None:
    """Its only device was revoked after it had answered, before resume was said."""
    known = silent()
    rollout = started(plan("1", "100%", on_success=OnSuccess.PAUSE), known)
    answer(known, rollout, DeviceEvent.COMMITTED)
    held = step(rollout, known, 1.0).rollout
    assert (held.state, held.held) == (State.PAUSED, True)
    left = {name: one for name, one in known.items() if not rollout.includes(name)}
    resumed = act(held, Verb.RESUME, list(left.values()), 2.0).rollout
    after = step(resumed, left, 2.0).rollout
    assert (after.state, after.wave) == (State.RUNNING, 1)


def test_whoever_is_passed_over_is_named_in_the_log() -> None:
    known = silent()
    rollout = started(plan("2", "100%", deadline_seconds=10.0), known)
    first = next(name for name in FLEET if rollout.includes(name))
    known[first] = replace(known[first], outcome=DeviceEvent.COMMITTED, running=NEW.release)
    second = step(rollout, known, 10.0)
    assert second.line.endswith("the wave before has settled, 1 silent")
    assert step(second.rollout, known, 20.0).line.endswith("every wave has settled, 19 silent")


def test_nobody_enrolled_cannot_start() -> None:
    with pytest.raises(RolloutError, match="no device is enrolled"):
        act(plan(), Verb.START, [], 0.0)


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ((), "no waves"),
        (("0", "100%"), "1 or more"),
        (("120%",), "up to 100"),
        (("five",), "neither a number"),
        (("nan%", "100%"), "up to 100"),
        (("50%", "25%", "100%"), "does not reach further"),
        (("100%", "100%"), "does not reach further"),
        (("1", "50%"), "last wave must be 100%"),
    ],
)
def test_impossible_waves_are_refused(waves: tuple[str, ...], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        Rollout(id="r", release=NEW, previous=OLD, waves=tuple(Wave.parse(wave) for wave in waves))


@pytest.mark.parametrize(
    "field",
    [
        {"max_failures": -1},
        {"quality_tolerance": float("nan")},
        {"bake_seconds": -1.0},
        {"deadline_seconds": 0.0},
        {"max_failure_share": 1.1},
        {"max_unhealthy": -1},
        {"max_memory_factor": 1.0},
        {"quality_alpha": 0.0},
        {"quality_clip": 2.0},
        {"quality_margin": 0.5},
        {"liar_share": 0.5},
        {"retries": Retries(device=-1)},
        {"window": "25:00-05:00"},
    ],
)
def test_impossible_policies_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(RolloutError, match=next(iter(field))):
        plan(**field)


def test_the_same_release_again_is_refused() -> None:
    with pytest.raises(RolloutError, match="already has stable-2"):
        plan(previous=NEW)


@given(st.integers(1, 300), st.floats(0.1, 100), st.text("abc", max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_wave_reaches_at_least_its_size_and_grows(size: int, percent: float, salt: str) -> None:
    devices = [f"d{number}" for number in range(size)]
    wave = Wave(percent=percent)
    points = reach(wave, devices, salt)
    inside = sum(bucket(salt, device) < points for device in devices)
    assert inside >= wave.size(size) >= 1
    assert reach(Wave(percent=min(100.0, percent * 1.5)), devices, salt) >= points


@given(st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_the_chosen_salt_gives_exact_counts(size: int) -> None:
    devices = [f"d{number}" for number in range(size)]
    waves = (Wave(count=1), Wave(count=3), Wave(percent=50), Wave(percent=100))
    salt = choose_salt("r-9", waves, devices)
    for wave in waves:
        inside = sum(bucket(salt, device) < reach(wave, devices, salt) for device in devices)
        assert inside == wave.size(size)


@pytest.mark.parametrize(
    "words",
    [
        ("99.99999%", "100%"),
        ("30.00000001%", "30.00000002%", "100%"),
        ("1e-7%", "100%"),
        ("1%x1.7",),
        ("where " + "or ".join(["cpu_count<1"] * 50), "100%"),
    ],
)
def test_a_plan_is_stored_as_it_was_read(words: tuple[str, ...]) -> None:
    """One that cannot be read again would stop every rollout of the server."""
    waves = parse_plan(words, 1000)
    rollout = Rollout(id="r-1", release=NEW, previous=OLD, waves=waves)
    assert Rollout.from_mapping(json.loads(json.dumps(rollout.to_mapping()))) == rollout


@pytest.mark.parametrize("word", ["1.2.3x2", "..x2", "1x.", "x2"])
def test_a_run_of_waves_without_a_number_is_refused(word: str) -> None:
    with pytest.raises(RolloutError, match="neither a number"):
        parse_plan([word], 20)
