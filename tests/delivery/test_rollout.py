"""The rollout's state machine: the table in its docstring, and what must hold in every history."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.orders import BASE, Observation, Orders, Target
from federation.policy import Policy
from federation.rollout import ALLOWED, Rollout, State, Verb, act, decide
from federation.waves import RolloutError, Wave, choose_salt, reach
from protos.messages import BUCKETS, DeviceEvent, Quality, RejectReason, bucket

NEW = Target("stable-2", "adapters/stable/2.airpeft", "22" * 32)
OLD = Target("stable-1", "adapters/stable/1.airpeft", "11" * 32)
FLEET = [f"d-{number}" for number in range(20)]


def plan(*waves: str, previous: Target = OLD, **policy: float) -> Rollout:
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
    return act(rollout, Verb.START, list(known.values()), now).rollout


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
    rollout = started(plan("2", "100%", max_failures=1), known)
    names = [name for name in FLEET if rollout.includes(name)]
    known[names[0]] = replace(known[names[0]], outcome=DeviceEvent.FAILED)
    known[names[1]] = replace(known[names[1]], outcome=DeviceEvent.COMMITTED, running=NEW.release)
    assert step(rollout, known, 1.0).rollout.wave == 1
    alone = started(plan("1", "100%", max_failures=1), silent())
    known = silent()
    answer(known, alone, DeviceEvent.FAILED)
    assert step(alone, known, 1.0).rollout.state is State.PAUSED


def test_a_refusal_that_speaks_of_the_clock_is_not_the_releases_fault() -> None:
    known = silent()
    rollout = started(plan(), known)
    answer(known, rollout, DeviceEvent.REJECTED, reason=RejectReason.CLOCK)
    assert step(rollout, known, 1.0).rollout == rollout


def test_worse_on_average_halts_though_every_device_committed() -> None:
    known = silent()
    rollout = started(plan("4", "100%", quality_tolerance=0.01), known)
    quality = Quality(examples=10, accuracy_before=0.80, accuracy_after=0.78)
    answer(known, rollout, DeviceEvent.COMMITTED, quality=quality)
    halted = step(rollout, known, 1.0)
    assert halted.rollout.state is State.HALTED
    assert "-0.0200" in halted.line
    # and then it waits for those that run it to come back, at most for the deadline
    back = step(halted.rollout, known, 2.0).rollout
    assert step(back, known, 3.0).rollout.state is State.ROLLING_BACK
    returned = {name: replace(one, running=OLD.release) for name, one in known.items()}
    assert step(back, returned, 3.0).rollout.state is State.ROLLED_BACK
    assert step(back, known, 2.0 + 3600).rollout.state is State.ROLLED_BACK


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
        assert act(rollout, verb, known, 1.0).rollout.state is not state
    else:
        with pytest.raises(RolloutError, match=f"cannot {verb} rollout r-1: it is {state}"):
            act(rollout, verb, known, 1.0)


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
    ],
)
def test_impossible_policies_are_refused(field: dict[str, float]) -> None:
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


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 11), st.sampled_from(sorted(DeviceEvent))),
        st.tuples(st.just("quality"), st.integers(0, 11), st.floats(-0.2, 0.2)),
        st.tuples(st.just("verb"), st.sampled_from(sorted(Verb)), st.none()),
        st.tuples(st.just("time"), st.floats(0, 200), st.none()),
        st.tuples(st.just("revoke"), st.integers(0, 11), st.none()),
        st.tuples(st.just("enrol"), st.integers(12, 30), st.none()),
        st.tuples(st.just("decide"), st.none(), st.none()),
    ),
    max_size=40,
)
NEXT = {
    State.DRAFT: {State.RUNNING, State.ABORTED},
    State.RUNNING: {
        State.RUNNING,
        State.DONE,
        State.PAUSED,
        State.HALTED,
        State.ROLLING_BACK,
        State.ABORTED,
    },
    State.PAUSED: {State.RUNNING, State.HALTED, State.ROLLING_BACK, State.ABORTED},
    State.HALTED: {State.ROLLING_BACK},
    State.DONE: {State.ROLLING_BACK},
    State.ROLLING_BACK: {State.ROLLED_BACK},
    State.ROLLED_BACK: set(),
    State.ABORTED: set(),
}


class History:
    """A fleet that does whatever hypothesis likes; the invariants are checked at every move."""

    def __init__(self) -> None:
        self.known = silent([f"d-{number}" for number in range(12)])
        self.rollout = plan("1", "3", "50%", "100%", bake_seconds=10.0, deadline_seconds=100.0)
        self.now = 0.0

    def move(self, kind: str, which: object, what: object) -> None:
        name = f"d-{which}"
        if kind == "say" and name in self.known and self.rollout.includes(name):
            event = DeviceEvent(what)  # type: ignore[arg-type]
            running = NEW.release if event is DeviceEvent.COMMITTED else OLD.release
            self.known[name] = replace(self.known[name], outcome=event, running=running)
        elif kind == "quality" and name in self.known:
            quality = Quality(examples=5, accuracy_before=0.5, accuracy_after=0.5 + float(what))  # type: ignore[arg-type]
            self.known[name] = replace(self.known[name], quality=quality)
        elif kind == "time":
            self.now += float(which)  # type: ignore[arg-type]
        elif kind == "revoke":
            self.known.pop(name, None)
        elif kind == "enrol":
            self.known.setdefault(name, Observation(device_id=name))
        elif kind == "decide":
            self.check(step(self.rollout, self.known, self.now))
        elif kind == "verb" and self.rollout.state in ALLOWED[Verb(which)] and self.known:  # type: ignore[arg-type]
            self.check(act(self.rollout, Verb(which), list(self.known.values()), self.now))  # type: ignore[arg-type]

    def check(self, decision: object) -> None:
        old, new = self.rollout, decision.rollout  # type: ignore[attr-defined]
        orders: Orders | None = decision.orders  # type: ignore[attr-defined]
        if new.state is not old.state:
            assert new.state in NEXT[old.state]
        failures = sum(one.failed for one in self.known.values())
        if old.state in (State.HALTED, State.ROLLING_BACK, State.ROLLED_BACK, State.ABORTED):
            assert new.wave == old.wave, "advanced after a halt"
        assert new.basis_points >= old.basis_points, "a wave shrank"
        assert new.wave - old.wave in (0, 1), "skipped a wave"
        if new.wave > max(old.wave, 0):
            assert failures <= old.policy.max_failures
            assert any(one.committed for one in self.known.values()), "went on without any proof"
        if orders is not None:
            for name in [*self.known, "somebody-new"]:
                target = told(orders, name)
                if target == NEW:
                    assert new.state is State.RUNNING
                    assert bucket(orders.salt, name) < new.basis_points
                    assert new.includes(name)
                elif new.state is State.ROLLING_BACK:
                    assert target == OLD
        assert Rollout.from_mapping(new.to_mapping()) == new
        self.rollout = new


@given(MOVES)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_invariants_hold(moves: list[tuple[str, object, object]]) -> None:
    history = History()
    history.move("verb", Verb.START, None)
    for kind, which, what in moves:
        history.move(kind, which, what)
    # and it comes to rest: time alone never leaves it in between
    for _ in range(20):
        history.move("time", 200.0, None)
        history.move("decide", None, None)
    resting = {State.PAUSED, State.ROLLED_BACK, State.DONE, State.ABORTED}
    assert history.rollout.state in resting
    assert history.rollout.basis_points <= BUCKETS
