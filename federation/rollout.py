"""A rollout as a pure state machine: what is known goes in, what to tell the fleet comes out.

No clock, no database, no network. :mod:`federation.ticker` stores what comes out and publishes it.

Transitions (``decide`` on the left of a comma, an operator's verb on the right)::

    from               to                 when
    -----------------  -----------------  ------------------------------------------------------
    draft              running            start: round for the first wave
    running            running            wave settled well and baked: round for the next wave;
                                          or, with a rate: round for the wave's next devices
    running            awaiting_approval  likewise, if the next needs a second operator
    awaiting_approval  running            approve, by another operator than the one who started
    running            done               last wave settled well and baked
    running            paused             pause; the wave settled and is no success; or it is one
                                          and the policy pauses then
    paused             running            resume: the wave's deadline starts anew, or, after a
                                          success, the next wave begins
    under way          halted             failures, health or quality beyond the policy's bounds
    halted             rolling_back       always, next: round that takes all to the release before
    halted             aborted            instead, where devices would refuse every release before
    under way, done,   rolling_back       rollback, unless devices would refuse every release before
    aborted
    rolling_back       rolled_back        nobody runs the release any more, or the deadline passed;
                                          or abort, which ends the wait alone
    draft, under way   aborted            abort: round without assignments, everybody stays

"Under way" is running, paused and awaiting approval: a pause stops the advance, never the brake.
``rolled_back`` is final, and ``aborted`` but for a roll-back; a round that rolls back stays in
force, so that a device which was away comes back to the previous release too.

A device *settles* when it commits, fails more often than its class of failure may try again, or is
silent for longer than the policy's deadline; so no device can block a wave for ever. A wave settles
once all of it has been told (at a rate: :mod:`federation.pacing`). Devices whose certificate is
revoked are not among the observations and count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from federation.judging import reason_to_halt, reason_to_hold, still_out
from federation.orders import Observation, Orders
from federation.pacing import further, held_back
from federation.policy import OnSuccess
from federation.rollout_nouns import (
    ACTIVE,
    ALLOWED,
    HALF,
    UNDER_WAY,
    Decision,
    Rollout,
    State,
    Verb,
    check_allowed,
)
from federation.waves import RolloutError, choose_salt, pick, reach, reach_of
from protos.messages import BUCKETS, bucket

__all__ = ["ACTIVE", "ALLOWED", "Decision", "Rollout", "State", "Verb", "act", "decide", "widen"]


def act(
    rollout: Rollout,
    verb: Verb,
    observations: Sequence[Observation],
    now: float,
    why: str = "",
    who: str = "",
    no_way_back: str = "",
) -> Decision:
    """Do what an operator asks.

    Args:
        rollout: as stored.
        verb: the wish.
        observations: one for each active device.
        now: Unix seconds.
        why: the operator's words, for the round and the log.
        who: the operator's name; starting and approving take two.
        no_way_back: why devices would refuse the release before; empty if they would not.

    Raises:
        RolloutError: the state doesn't allow it, nobody is enrolled to start with, the operator
            who started it wants to approve it as well, or there is no way back.
    """
    check_allowed(rollout, verb)
    if verb is Verb.ROLLBACK and no_way_back:
        raise RolloutError(
            f"cannot rollback rollout {rollout.id}: {no_way_back}; devices would stay as they are."
            " Roll out a newer release; until then, abort stops a rollout that is under way"
        )
    why = why or f"operator: {verb}"
    if verb is Verb.START:
        return _start(rollout, observations, now, why, who)
    if verb is Verb.APPROVE:
        if not who or who == rollout.started_by:
            raise RolloutError(
                f"rollout {rollout.id} was started by {rollout.started_by or 'nobody known'}:"
                " another operator must approve it"
            )
        approved = replace(rollout, approved_by=who, cleared=rollout.wave)
        return _to(approved, State.RUNNING, f"approved by {who}: {why}")
    if verb is Verb.PAUSE:
        return _to(rollout, State.PAUSED, why)
    if verb is Verb.RESUME:
        if rollout.held:
            passed = replace(rollout, held=False, cleared=rollout.wave)
            return _to(passed, State.RUNNING, why)
        return _to(replace(rollout, wave_began=now, settled_at=None), State.RUNNING, why)
    if verb is Verb.ABORT and rollout.state is State.ROLLING_BACK:
        return _rolled_back(rollout, observations, suffix=f"; no longer waited for: {why}")
    if verb is Verb.ABORT:
        orders = None
        if rollout.state is not State.DRAFT:
            orders = Orders(rollout.salt, (), f"aborted: {why}")
        return _to(rollout, State.ABORTED, why, orders)
    return _roll_back(rollout, now, why)


def decide(
    rollout: Rollout, observations: Sequence[Observation], now: float, no_way_back: str = ""
) -> Decision:
    """One step, if there is one to take; otherwise the rollout as it was.

    Args:
        rollout: as stored.
        observations: one for each active device.
        now: Unix seconds.
        no_way_back: why devices would refuse the release before; empty if they would not. Looked
            at where the rollout is halted.
    """
    if rollout.state in UNDER_WAY:
        # What a device says that was not reached is no news of the release: it may be a lie.
        arms = _arms(rollout, [one for one in observations if rollout.includes(one.device_id)])
        reason = reason_to_halt(rollout.policy, arms, [len(arm) for arm in arms])
        if reason:
            return _to(rollout, State.HALTED, reason)
    if rollout.state is State.RUNNING:
        return _go_on(rollout, observations, now)
    if rollout.state is State.HALTED:
        if no_way_back:
            why = f"{rollout.why}; devices stay as they are, for there is no way back:"
            orders = Orders(rollout.salt, (), f"halted: {rollout.why}")
            return _to(rollout, State.ABORTED, f"{why} {no_way_back}", orders)
        return _roll_back(rollout, now, rollout.why)
    if rollout.state is State.ROLLING_BACK:
        late = now - rollout.wave_began >= rollout.policy.deadline_seconds
        if late or not _still_with_it(rollout, observations):
            return _rolled_back(rollout, observations)
    return Decision(rollout)


def widen(rollout: Rollout, observations: Sequence[Observation]) -> Rollout:
    """The rollout with its next wave's reach; nobody who was reached is left out.

    Args:
        rollout: with its salt.
        observations: one for each active device.
    """
    index = rollout.wave + 1
    wave = rollout.waves[index]
    names = [one.device_id for one in observations]
    wider = replace(rollout, wave=index)
    if wave.where is not None:
        matching = [one.device_id for one in observations if wave.where.matches(one.facts)]
        picked = {*rollout.members, *pick(wave, matching, rollout.salt)}
        return replace(wider, members=tuple(sorted(picked)))
    points, other = rollout.halves
    if rollout.other is None:
        points = reach(wave, names, rollout.salt)
    elif not wave.everybody:
        size = wave.size(len(names))
        lower = [name for name in names if rollout.arm(name) == 0]
        upper = sorted(bucket(rollout.salt, name) for name in names if rollout.arm(name) == 1)
        points = reach_of(min((size + 1) // 2, len(lower)), lower, rollout.salt)
        other = BUCKETS - upper[-min(size // 2, len(upper))] if upper and size > 1 else 0
    return replace(
        wider,
        basis_points=max(points, rollout.basis_points),
        other_points=max(other, rollout.other_points),
    )


def _start(
    rollout: Rollout, observations: Sequence[Observation], now: float, why: str, who: str
) -> Decision:
    if not observations:
        raise RolloutError(
            f"cannot start rollout {rollout.id}: no device is enrolled; see: airpeft fleet list"
        )
    names = [one.device_id for one in observations]
    at = HALF if rollout.other is not None else None
    salt = choose_salt(rollout.id, rollout.waves, names, balanced_at=at)
    return _next_wave(replace(rollout, salt=salt, started_by=who), observations, now, why)


def _arms(rollout: Rollout, observations: Sequence[Observation]) -> list[list[Observation]]:
    arms: list[list[Observation]] = [[] for _ in rollout.targets]
    for one in observations:
        arms[rollout.arm(one.device_id)].append(one)
    return arms


def _go_on(rollout: Rollout, observations: Sequence[Observation], now: float) -> Decision:
    policy = rollout.policy
    if rollout.goal is not None:
        return _tell_more(rollout, observations, now)
    reached = [one for one in observations if rollout.includes(one.device_id)]
    waiting = still_out(policy, reached)
    if waiting and now - rollout.wave_began < policy.patience:
        # A device enrolled during the bake belongs to the wave as well.
        return Decision(replace(rollout, settled_at=None))
    name = f"wave {rollout.wave + 1}"
    silent = f", {len(waiting)} silent" if waiting else ""
    shortfall = reason_to_hold(policy, _arms(rollout, reached))
    if shortfall and rollout.cleared < rollout.wave:  # else an operator has let the wave pass
        return _to(replace(rollout, held=False), State.PAUSED, f"{name}: {shortfall}")
    if rollout.settled_at is None:
        rollout = replace(rollout, settled_at=now)
        if policy.bake_seconds > 0:
            return Decision(rollout, line=f"{name} settled{silent}; baking")
    elif now - rollout.settled_at < policy.bake_seconds:
        return Decision(rollout)
    if rollout.wave + 1 == len(rollout.waves):
        return _to(rollout, State.DONE, f"every wave has settled{silent}")
    if policy.two_person and not rollout.approved_by:
        asks = f"{name} went well{silent}; a second operator decides"
        return _to(rollout, State.AWAITING_APPROVAL, asks)
    if policy.on_success is OnSuccess.PAUSE and rollout.cleared < rollout.wave:
        held = replace(rollout, held=True)
        return _to(held, State.PAUSED, f"{name} went well{silent}; resume begins the next")
    return _next_wave(rollout, observations, now, f"the wave before has settled{silent}")


def _next_wave(
    rollout: Rollout, observations: Sequence[Observation], now: float, why: str
) -> Decision:
    wider = replace(
        widen(rollout, observations),
        state=State.RUNNING,
        wave_began=now,
        settled_at=None,
        why=why,
    )
    if rollout.policy.rate is not None:
        wider = further(held_back(rollout, wider), observations, now)
    name = f"wave {wider.wave + 1} of {len(wider.waves)} ({wider.waves[wider.wave]})"
    line = f"{rollout.state} -> running: {name}: {why}"
    return Decision(wider, wider.orders(f"{name}: {why}"), line)


def _tell_more(rollout: Rollout, observations: Sequence[Observation], now: float) -> Decision:
    """The next devices of a wave that is told at a rate, if it is time."""
    wider = further(rollout, observations, now)
    if wider.notified == rollout.notified and wider.goal is not None:
        return Decision(wider)
    name = f"wave {wider.wave + 1} of {len(wider.waves)}"
    line = f"{name}: {wider.notified - rollout.notified} more told, {wider.notified} in all"
    line += "" if wider.goal else "; all of the wave is told"
    return Decision(wider, wider.orders(f"{name}: {rollout.policy.rate}"), line)


def _roll_back(rollout: Rollout, now: float, why: str) -> Decision:
    returning = replace(rollout, wave_began=now, settled_at=None)
    orders = rollout.orders_back(f"rolled back: {why}")
    back = f"; back to {rollout.previous.release or 'the base model'}"
    return _to(returning, State.ROLLING_BACK, why, orders, suffix=back)


def _rolled_back(
    rollout: Rollout, observations: Sequence[Observation], suffix: str = ""
) -> Decision:
    """The end of a roll-back, whose round stays in force."""
    left = _still_with_it(rollout, observations)
    missing = f"; {left} devices have not answered yet" if left else ""
    return _to(rollout, State.ROLLED_BACK, rollout.why, suffix=missing + suffix)


def _still_with_it(rollout: Rollout, observations: Sequence[Observation]) -> int:
    names = {target.release for target in rollout.targets}
    return sum(one.running in names for one in observations)


def _to(
    rollout: Rollout, state: State, why: str, orders: Orders | None = None, suffix: str = ""
) -> Decision:
    line = f"{rollout.state} -> {state}: {why}{suffix}"
    return Decision(replace(rollout, state=state, why=why), orders, line)
