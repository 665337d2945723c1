"""Whatever operators, devices and clocks do, in whatever order: what must hold of every rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from federation.filters import Filter
from federation.orders import Observation, Orders, Target
from federation.policy import OnSuccess, Policy, Retries
from federation.rate import Counting, Rate
from federation.rollout import ACTIVE, ALLOWED, Decision, Rollout, State, Verb, act, decide
from federation.waves import RolloutError, Wave
from protos.messages import DeviceEvent, Quality, RejectReason, bucket

NEW = Target("stable-2", "adapters/stable/2.airpeft", "22" * 32)
THIRD = Target("stable-3", "adapters/stable/3.airpeft", "33" * 32)
OLD = Target("stable-1", "adapters/stable/1.airpeft", "11" * 32)
NORTH = Filter.parse('tag.site == "north"')
PLANS = (
    ("1", "3", "50%", "100%"),
    ('1 where tag.site == "north"', 'where tag.site == "north"', "100%"),
    ("2", 'where id ~ "d-*" and tag.site == "north"', "60%", "100%"),
)
RATES = (
    None,
    Rate(per_minute=1),
    Rate(per_minute=12),
    Rate(per_minute=2, factor=2.0, every=3, counting=Counting.SUCCEEDED, max_per_minute=9),
)
UNDER_WAY = {State.RUNNING, State.PAUSED, State.AWAITING_APPROVAL}
END = {State.HALTED, State.ROLLING_BACK, State.ABORTED}
NEXT = {
    State.DRAFT: {State.RUNNING, State.ABORTED},
    State.RUNNING: {State.RUNNING, State.DONE, State.PAUSED, State.AWAITING_APPROVAL} | END,
    State.PAUSED: {State.RUNNING} | END,
    State.AWAITING_APPROVAL: {State.RUNNING} | END,
    State.HALTED: {State.ROLLING_BACK, State.ABORTED},
    State.DONE: {State.ROLLING_BACK},
    State.ROLLING_BACK: {State.ROLLED_BACK},
    State.ROLLED_BACK: set(),
    State.ABORTED: {State.ROLLING_BACK},
}
RESTING = {
    State.PAUSED,
    State.AWAITING_APPROVAL,
    State.ROLLED_BACK,
    State.DONE,
    State.ABORTED,
}
DEVICES = st.integers(0, 14).map(lambda number: f"d-{number}")


def site(name: str) -> dict[str, str]:
    return {"id": name, "tag.site": "north" if int(name[2:]) % 3 == 0 else "south"}


class Fleet(RuleBasedStateMachine):
    """A fleet and two operators that do whatever hypothesis likes."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Observation] = {}
        self.now = 0.0
        self.reached: dict[str, int] = {}  # who was ever told to take it, and on which side
        self.orders: Orders | None = None
        self.told: list[tuple[float, int]] = []

    @initialize(
        words=st.sampled_from(PLANS),
        compare=st.booleans(),
        two_person=st.booleans(),
        on_success=st.sampled_from(list(OnSuccess)),
        max_failures=st.integers(0, 2),
        rate=st.sampled_from(RATES),
        size=st.integers(1, 12),
    )
    def begin(self, words, compare, two_person, on_success, max_failures, rate, size) -> None:  # type: ignore[no-untyped-def]
        for number in range(size):
            self._join(f"d-{number}")
        policy = Policy(
            max_failures=max_failures,
            two_person=two_person,
            on_success=on_success,
            bake_seconds=10.0,
            deadline_seconds=100.0,
            retries=Retries(device=1),
            rate=rate,
        )
        self.rollout = Rollout(
            id="r-1",
            release=NEW,
            other=THIRD if compare else None,
            previous=OLD,
            waves=tuple(Wave.parse(word) for word in words),
            policy=policy,
        )
        self._take(act(self.rollout, Verb.START, self.seen, self.now, who="ann"))

    @property
    def seen(self) -> list[Observation]:
        return list(self.known.values())

    def _join(self, name: str) -> None:
        self.known.setdefault(name, Observation(device_id=name, running="", facts=site(name)))

    @rule(name=DEVICES)
    def enrol(self, name: str) -> None:
        self._join(name)

    @rule(name=DEVICES)
    def revoke(self, name: str) -> None:
        self.known.pop(name, None)

    @rule(
        name=DEVICES,
        event=st.sampled_from(sorted(DeviceEvent)),
        reason=st.sampled_from([None, RejectReason.GUARD, RejectReason.CLOCK]),
        fall=st.none() | st.floats(-0.3, 0.3),
    )
    def say(self, name: str, event: DeviceEvent, reason, fall) -> None:  # type: ignore[no-untyped-def]
        if name not in self.known or not self.rollout.includes(name):
            return
        one = self.known[name]
        quality = fall and Quality(examples=9, accuracy_before=0.5, accuracy_after=0.5 - fall)
        attempts = one.attempts + 1 if one.failed else 1
        running = self.rollout.targets[self.rollout.arm(name)].release
        self.known[name] = replace(
            one,
            outcome=event,
            reason=reason,
            quality=quality or None,
            attempts=attempts,
            running=running if event is DeviceEvent.COMMITTED else OLD.release,
        )

    @rule()
    def everybody_obeys(self) -> None:
        for name in self.known:
            if self.rollout.state in UNDER_WAY:
                self.say(name, DeviceEvent.COMMITTED, None, None)
            elif self.rollout.state is State.ROLLING_BACK:
                self.known[name] = replace(self.known[name], running=OLD.release)

    @rule(seconds=st.floats(0.0, 200.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(stuck=st.sampled_from(["", "", "stable-1 is revoked"]))
    def tick(self, stuck: str) -> None:
        self._take(decide(self.rollout, self.seen, self.now, stuck))

    @rule(verb=st.sampled_from(list(Verb)), who=st.sampled_from(["ann", "ben"]))
    def ask(self, verb: Verb, who: str) -> None:
        own = verb is Verb.APPROVE and who == self.rollout.started_by
        if self.rollout.state in ALLOWED[verb] and not own:
            self._take(act(self.rollout, verb, self.seen, self.now, who=who))
        else:
            with pytest.raises(RolloutError):
                act(self.rollout, verb, self.seen, self.now, who=who)

    def _take(self, decision: Decision) -> None:
        old, new = self.rollout, decision.rollout
        if new.state is not old.state:
            assert new.state in NEXT[old.state], f"{old.state} -> {new.state}"
        assert new.basis_points >= old.basis_points, "a wave shrank"
        assert new.other_points >= old.other_points, "a wave shrank"
        if old.salt:
            for name in self.known:
                assert new.includes(name) >= old.includes(name), "a wave let a device go"
        assert new.wave - old.wave in (0, 1), "skipped a wave"
        if new.wave > max(old.wave, 0):
            self._check_advance(old)
        self._check_rate(old, new)
        if new.wave > old.wave:
            self._check_size(old, new)
        if old.state not in UNDER_WAY and old.state is not State.DRAFT:
            assert new.wave == old.wave, "advanced after its end"
        assert Rollout.from_mapping(new.to_mapping()) == new
        self.rollout = new
        if decision.orders is not None:
            self.orders = decision.orders
            assert Orders.from_mapping(_plain(decision.orders)) == decision.orders
            self._check_orders(decision.orders)

    def _check_advance(self, old: Rollout) -> None:
        """The next wave began: only with proof, approval, and few failures."""
        policy = old.policy
        failed = [one for one in self.seen if one.given_up(policy.retries)]
        reached = sum(old.includes(name) for name in self.known)
        assert len(failed) <= policy.allowed_failures(reached)
        passed = old.cleared == old.wave  # by an operator, when there was proof
        assert passed or any(one.committed for one in self.seen), "went on without any proof"
        if policy.two_person:
            assert old.approved_by not in ("", old.started_by)
        if policy.on_success is OnSuccess.PAUSE:
            assert old.cleared == old.wave

    def _check_size(self, old: Rollout, new: Rollout) -> None:
        """Never more devices than the wave allows, but for shared buckets, which 15 don't have."""
        inside = {name for name in self.known if new.includes(name)}
        before = {name for name in self.known if old.wave >= 0 and old.includes(name)}
        wave = new.waves[new.wave]
        fits = [name for name in self.known if wave.where is None or wave.where.matches(site(name))]
        allowed = wave.size(len(fits))
        buckets = {bucket(new.salt, name) for name in self.known}
        shared = len(self.known) - len(buckets)
        assert len(inside - before) <= allowed + shared
        assert inside - before <= set(fits), "reached a device that the filter does not mean"

    def _check_rate(self, old: Rollout, new: Rollout) -> None:
        """Exactly those are reached that were counted, and never too many of them in a minute."""
        rate = new.policy.rate
        if rate is None or old.notified == new.notified:
            return
        fresh = [n for n in self.known if new.includes(n) and not (old.salt and old.includes(n))]
        assert len(fresh) == new.notified - old.notified
        self.told.append((self.now, len(fresh)))
        last = sum(count for at, count in self.told if self.now - at < 60)
        counted = rate.now(old.notified, sum(one.committed for one in self.seen))
        assert last <= counted, "more devices told in a minute than the rate allows"

    def _check_orders(self, orders: Orders) -> None:
        document = orders.to_document(1, "r-1")
        for name in [*self.known, "d-999"]:
            wanted = document.assignment_of(name)
            if self.rollout.state in (State.ROLLING_BACK, State.ROLLED_BACK):
                assert wanted is not None
                assert wanted.target == OLD.path
            elif wanted is not None and wanted.target != OLD.path:
                assert self.rollout.state is State.RUNNING
                assert self.rollout.includes(name)
                side = self.rollout.arm(name)
                assert wanted.target == self.rollout.targets[side].path
                assert self.reached.setdefault(name, side) == side, "changed sides"

    @invariant()
    @precondition(lambda self: hasattr(self, "rollout"))
    def time_alone_brings_it_to_rest(self) -> None:
        rollout, now = self.rollout, self.now
        for _ in range(4 * len(rollout.waves) + 4 + 2 * len(self.known)):
            now += 200.0
            rollout = decide(rollout, self.seen, now).rollout
        assert rollout.state in RESTING, "a silent device blocks it"
        assert rollout.state not in ACTIVE - RESTING


def _plain(orders: Orders) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(orders)


Fleet.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestFleet = Fleet.TestCase
