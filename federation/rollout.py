"""A rollout as a pure state machine: what is known goes in, what to tell the fleet comes out.

No clock, no database, no network. :mod:`federation.ticker` stores what comes out and publishes it.

Transitions (``decide`` on the left of a comma, an operator's verb on the right)::

    from          to            when
    ------------  ------------  ------------------------------------------------------------------
    draft         running       start: round for the first wave
    running       running       wave settled and baked: round for the next wave
    running       done          last wave settled and baked
    running       paused        pause; or the wave settled and nobody at all has committed
    paused        running       resume: the wave's deadline starts anew
    running       halted        more failures than allowed, or worse by more than the tolerance
    paused        halted        likewise: a pause stops the advance, never the brake
    halted        rolling_back  always, next: round that takes everybody to the previous release
    running       rolling_back  rollback
    paused        rolling_back  rollback
    done          rolling_back  rollback
    rolling_back  rolled_back   nobody runs the release any more, or the deadline has passed
    draft         aborted       abort
    running       aborted       abort: round without assignments, everybody stays as it is
    paused        aborted       abort: likewise

``rolled_back`` and ``aborted`` are final; a round that rolls back stays in force, so that a device
which was away comes back to the previous release too.

A device *settles* when it commits, fails, or is silent for longer than the policy's deadline; so no
device can block a wave for ever. Devices whose certificate is revoked are not among the
observations and count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from federation.orders import Assignment, Observation, Orders, Target
from federation.policy import Policy
from federation.waves import RolloutError, Wave, check_waves, choose_salt, reach
from protos.messages import BUCKETS, bucket


class State(StrEnum):
    """Where a rollout stands; see the table in the module's docstring."""

    DRAFT = "draft"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    DONE = "done"
    ABORTED = "aborted"


ACTIVE = frozenset({State.RUNNING, State.PAUSED, State.HALTED, State.ROLLING_BACK})


class Verb(StrEnum):
    """What an operator may ask of a rollout."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLLBACK = "rollback"


ALLOWED: Mapping[Verb, frozenset[State]] = {
    Verb.START: frozenset({State.DRAFT}),
    Verb.PAUSE: frozenset({State.RUNNING}),
    Verb.RESUME: frozenset({State.PAUSED}),
    Verb.ABORT: frozenset({State.DRAFT, State.RUNNING, State.PAUSED}),
    Verb.ROLLBACK: frozenset({State.RUNNING, State.PAUSED, State.DONE}),
}


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One release on its way to the fleet. Times are Unix seconds.

    Attributes:
        wave: index of the current wave; -1 before the start.
        basis_points: how far the release reaches now; never shrinks while it runs.
        wave_began: start of the current wave, or of the roll-back.
        settled_at: since when every device of the wave has settled.
    """

    id: str
    release: Target
    previous: Target
    waves: tuple[Wave, ...]
    policy: Policy = field(default_factory=Policy)
    salt: str = ""
    state: State = State.DRAFT
    wave: int = -1
    basis_points: int = 0
    wave_began: float = 0.0
    settled_at: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        check_waves(self.waves)
        if not self.release.path:
            raise RolloutError(f"rollout {self.id}: no release given")
        if self.release == self.previous:
            raise RolloutError(
                f"rollout {self.id}: the fleet already has {self.release.release}; choose another"
            )

    def includes(self, device_id: str) -> bool:
        """Whether the release may reach this device by now."""
        return bucket(self.salt, device_id) < self.basis_points

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values, as :meth:`from_mapping` reads them."""
        return {**asdict(self), "waves": [str(wave) for wave in self.waves]}

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> Rollout:
        """The rollout that :meth:`to_mapping` wrote."""
        return cls(
            **{
                **fields,
                "release": Target(**fields["release"]),
                "previous": Target(**fields["previous"]),
                "waves": tuple(Wave.parse(wave) for wave in fields["waves"]),
                "policy": Policy(**fields["policy"]),
                "state": State(fields["state"]),
            }
        )


@dataclass(frozen=True)
class Decision:
    """The rollout as it now stands, what to tell the fleet (or nothing), and a line for the log."""

    rollout: Rollout
    orders: Orders | None = None
    line: str = ""


def act(
    rollout: Rollout, verb: Verb, observations: Sequence[Observation], now: float, why: str = ""
) -> Decision:
    """Do what an operator asks.

    Args:
        rollout: as stored.
        verb: the wish.
        observations: one for each active device.
        now: Unix seconds.
        why: the operator's words, for the round and the log.

    Raises:
        RolloutError: the state doesn't allow it, or nobody is enrolled to start with.
    """
    if rollout.state not in ALLOWED[verb]:
        allowed = ", ".join(sorted(ALLOWED[verb]))
        raise RolloutError(
            f"cannot {verb} rollout {rollout.id}: it is {rollout.state}; {verb} needs: {allowed}"
        )
    why = why or f"operator: {verb}"
    if verb is Verb.START:
        if not observations:
            raise RolloutError(
                f"cannot start rollout {rollout.id}: no device is enrolled; see: airpeft fleet list"
            )
        salt = choose_salt(rollout.id, rollout.waves, [one.device_id for one in observations])
        return _next_wave(replace(rollout, salt=salt), observations, now, why)
    if verb is Verb.PAUSE:
        return _to(rollout, State.PAUSED, why)
    if verb is Verb.RESUME:
        resumed = replace(rollout, wave_began=now, settled_at=None)
        return _to(resumed, State.RUNNING, why)
    if verb is Verb.ABORT:
        orders = None
        if rollout.state is not State.DRAFT:
            orders = Orders(rollout.salt, (), f"aborted: {why}")
        return _to(rollout, State.ABORTED, why, orders)
    return _roll_back(rollout, now, why)


def decide(rollout: Rollout, observations: Sequence[Observation], now: float) -> Decision:
    """One step, if there is one to take; otherwise the rollout as it was.

    Args:
        rollout: as stored.
        observations: one for each active device.
        now: Unix seconds.
    """
    if rollout.state in (State.RUNNING, State.PAUSED):
        reason = _reason_to_halt(rollout, observations)
        if reason:
            return _to(rollout, State.HALTED, reason)
    if rollout.state is State.RUNNING:
        return _go_on(rollout, observations, now)
    if rollout.state is State.HALTED:
        return _roll_back(rollout, now, rollout.why)
    if rollout.state is State.ROLLING_BACK:
        left = [one.device_id for one in observations if one.running == rollout.release.release]
        late = now - rollout.wave_began >= rollout.policy.deadline_seconds
        if not left or late:
            missing = f"; {len(left)} devices have not answered yet" if left else ""
            return _to(rollout, State.ROLLED_BACK, rollout.why, suffix=missing)
    return Decision(rollout)


def _reason_to_halt(rollout: Rollout, observations: Sequence[Observation]) -> str:
    failed = [one for one in observations if one.failed]
    if len(failed) > rollout.policy.max_failures:
        reasons = sorted({str(one.reason or one.outcome) for one in failed})
        allowed = rollout.policy.max_failures
        return f"{len(failed)} devices failed ({', '.join(reasons)}), {allowed} allowed"
    changes = [
        one.quality.accuracy_after - one.quality.accuracy_before
        for one in observations
        if one.outcome is not None and one.quality is not None and one.quality.examples > 0
    ]
    if changes:
        mean = sum(changes) / len(changes)
        if mean < -rollout.policy.quality_tolerance:
            return (
                f"mean accuracy change {mean:+.4f} on {len(changes)} devices, at worst"
                f" {-rollout.policy.quality_tolerance:+.4f} allowed"
            )
    return ""


def _go_on(rollout: Rollout, observations: Sequence[Observation], now: float) -> Decision:
    waiting = [
        one
        for one in observations
        if rollout.includes(one.device_id) and not one.committed and not one.failed
    ]
    late = now - rollout.wave_began >= rollout.policy.deadline_seconds
    if waiting and not late:
        # A device enrolled during the bake belongs to the wave as well.
        return Decision(replace(rollout, settled_at=None))
    if not any(one.committed for one in observations):
        return _to(rollout, State.PAUSED, f"nobody in wave {rollout.wave + 1} runs the release")
    if rollout.settled_at is None:
        settled = replace(rollout, settled_at=now)
        if rollout.policy.bake_seconds > 0:
            silent = f", {len(waiting)} silent" if waiting else ""
            return Decision(settled, line=f"wave {rollout.wave + 1} settled{silent}; baking")
        rollout = settled
    elif now - rollout.settled_at < rollout.policy.bake_seconds:
        return Decision(rollout)
    if rollout.wave + 1 == len(rollout.waves):
        return _to(rollout, State.DONE, "every wave has settled")
    return _next_wave(rollout, observations, now, "the wave before has settled")


def _next_wave(
    rollout: Rollout, observations: Sequence[Observation], now: float, why: str
) -> Decision:
    wave = rollout.waves[rollout.wave + 1]
    points = reach(wave, [one.device_id for one in observations], rollout.salt)
    further = replace(
        rollout,
        state=State.RUNNING,
        wave=rollout.wave + 1,
        basis_points=max(points, rollout.basis_points),
        wave_began=now,
        settled_at=None,
        why=why,
    )
    name = f"wave {further.wave + 1} of {len(further.waves)} ({wave})"
    assignments = [Assignment(further.basis_points, further.release)]
    if further.basis_points < BUCKETS:
        assignments.append(Assignment(BUCKETS, further.previous))
    orders = Orders(further.salt, tuple(assignments), f"{name}: {why}")
    return Decision(further, orders, f"{rollout.state} -> running: {name}: {why}")


def _roll_back(rollout: Rollout, now: float, why: str) -> Decision:
    returning = replace(rollout, wave_began=now, settled_at=None)
    orders = Orders(rollout.salt, (Assignment(BUCKETS, rollout.previous),), f"rolled back: {why}")
    return _to(returning, State.ROLLING_BACK, why, orders)


def _to(
    rollout: Rollout, state: State, why: str, orders: Orders | None = None, suffix: str = ""
) -> Decision:
    line = f"{rollout.state} -> {state}: {why}{suffix}"
    return Decision(replace(rollout, state=state, why=why), orders, line)
