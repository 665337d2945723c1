"""A rollout as it is stored: its states, its verbs, who is reached, what the fleet is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from federation.orders import Assignment, Orders, Target
from federation.policy import Policy
from federation.waves import RolloutError, Wave, check_waves
from protos.members import MAX_MEMBERS
from protos.messages import BUCKETS, bucket
from protos.signed import MAX_BAKE

HALF = BUCKETS // 2
MAX_PICKED = MAX_MEMBERS - 1_000  # by filters; the rest is for a bucket that is told in parts


class State(StrEnum):
    """Where a rollout stands; see the table in :mod:`federation.rollout`."""

    DRAFT = "draft"
    RUNNING = "running"
    AWAITING_APPROVAL = "awaiting_approval"
    PAUSED = "paused"
    HALTED = "halted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    DONE = "done"
    ABORTED = "aborted"


UNDER_WAY = frozenset({State.RUNNING, State.PAUSED, State.AWAITING_APPROVAL})
ACTIVE = UNDER_WAY | {State.HALTED, State.ROLLING_BACK}


class Verb(StrEnum):
    """What an operator may ask of a rollout."""

    START = "start"
    APPROVE = "approve"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLLBACK = "rollback"


ALLOWED: Mapping[Verb, frozenset[State]] = {
    Verb.START: frozenset({State.DRAFT}),
    Verb.APPROVE: frozenset({State.AWAITING_APPROVAL}),
    Verb.PAUSE: frozenset({State.RUNNING}),
    Verb.RESUME: frozenset({State.PAUSED}),
    Verb.ABORT: UNDER_WAY | {State.DRAFT, State.ROLLING_BACK},
    Verb.ROLLBACK: UNDER_WAY | {State.DONE, State.ABORTED},
}


def allows(verb: Verb, state: State, wave: int) -> bool:
    """Whether a rollout in this state, and at this wave, takes an operator's verb.

    What never began has nothing to go back from.
    """
    return state in ALLOWED[verb] and (verb is not Verb.ROLLBACK or wave >= 0)


@dataclass(frozen=True)
class Goal:
    """How far a wave shall reach in the end, while its devices are told at a rate."""

    basis_points: int
    other_points: int
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One release on its way to the fleet, or two that are compared. Times are Unix seconds.

    In a comparison the lower half of the buckets takes ``release`` and the upper half ``other``;
    both grow from their outer end towards the middle, so that nobody ever changes sides.

    Attributes:
        other: the second release of a comparison (A/B); None for a plain rollout.
        wave: index of the current wave; -1 before the start.
        basis_points: how far the release reaches now; never shrinks while it runs.
        other_points: likewise for ``other``, from the top.
        members: devices that are reached by name: picked by a filter, or told at a rate out of a
            bucket that isn't told whole yet. Loses one only where the buckets reach it, too.
        goal: how far the current wave shall reach; None when all of it has been told.
        notified: devices told by this rollout, counted while the policy has a rate.
        told: (when, devices) of the newest batches, see :func:`federation.rate.allowance`.
        wave_began: start of the current wave, of the newest batch of its devices that was told, or
            of the roll-back: since when the deadline of silent devices runs.
        settled_at: since when every device of the wave has settled.
        started_by: the operator who started it.
        approved_by: the second one, who let it go beyond the first wave.
        held: whether it is paused because its wave was a success.
        cleared: index of the last wave that an operator has let pass.
    """

    id: str
    release: Target
    previous: Target
    waves: tuple[Wave, ...]
    other: Target | None = None
    policy: Policy = field(default_factory=Policy)
    salt: str = ""
    state: State = State.DRAFT
    wave: int = -1
    basis_points: int = 0
    other_points: int = 0
    members: tuple[str, ...] = ()
    goal: Goal | None = None
    notified: int = 0
    told: tuple[tuple[float, int], ...] = ()
    wave_began: float = 0.0
    settled_at: float | None = None
    started_by: str = ""
    approved_by: str = ""
    held: bool = False
    cleared: int = -1
    why: str = ""

    def __post_init__(self) -> None:
        check_waves(self.waves)
        if not self.release.path:
            raise RolloutError(f"rollout {self.id}: no release given")
        for target in self.targets:
            if target == self.previous:
                raise RolloutError(
                    f"rollout {self.id}: the fleet already has {target.release}; choose another"
                )
        if self.other is not None and (not self.other.path or self.other == self.release):
            raise RolloutError(f"rollout {self.id}: a comparison needs two different releases")
        if self.policy.two_person and len(self.waves) < 2:
            raise RolloutError(
                f"rollout {self.id}: a second operator approves what goes beyond the first wave;"
                " give a smaller wave before the 100%"
            )
        picked = len(self.goal.members if self.goal is not None else self.members)
        if picked > MAX_PICKED or len(self.members) > MAX_MEMBERS:
            raise RolloutError(
                f"rollout {self.id}: filters have picked {picked} devices, at most"
                f" {MAX_PICKED} can be named: use a percentage without a filter"
            )

    @property
    def targets(self) -> tuple[Target, ...]:
        """The release, or both of a comparison."""
        return (self.release,) if self.other is None else (self.release, self.other)

    @property
    def halves(self) -> tuple[int, int]:
        """Basis points at which each of the two sides covers all of its half."""
        return (BUCKETS, 0) if self.other is None else (HALF, HALF)

    @property
    def everybody(self) -> bool:
        """Whether all devices are reached, later ones too."""
        return (self.basis_points, self.other_points) == self.halves

    def arm(self, device_id: str) -> int:
        """Which of :attr:`targets` a device takes, once it is reached."""
        return int(self.other is not None and bucket(self.salt, device_id) >= HALF)

    def includes(self, device_id: str) -> bool:
        """Whether its release may reach this device by now."""
        return device_id in self._members or self.covers(device_id)

    def covers(self, device_id: str) -> bool:
        """Whether the buckets that are reached by now include this device."""
        place = bucket(self.salt, device_id)
        return place < self.basis_points or place >= BUCKETS - self.other_points

    @cached_property
    def _members(self) -> frozenset[str]:
        return frozenset(self.members)

    def orders(self, reason: str) -> Orders:
        """What the fleet is told while it goes on."""
        found: list[Assignment] = []
        if self.members and not self.everybody:
            if self.other is None:
                found.append(Assignment(BUCKETS, self.release, self.members))
            else:
                found.append(Assignment(HALF, self.release, self.members))
                found.append(Assignment(BUCKETS, self.other, self.members))
        if self.basis_points:
            found.append(Assignment(self.basis_points, self.release))
        if self.basis_points < BUCKETS - self.other_points:
            found.append(Assignment(BUCKETS - self.other_points, self.previous))
        if self.other is not None and self.other_points:
            found.append(Assignment(BUCKETS, self.other))
        return self._told(tuple(found), reason)

    def orders_back(self, reason: str) -> Orders:
        """What the fleet is told to bring everybody back; at once, whatever the window."""
        return Orders(self.salt, (Assignment(BUCKETS, self.previous),), reason)

    def _told(self, assignments: tuple[Assignment, ...], reason: str) -> Orders:
        bake = min(MAX_BAKE, int(self.policy.bake_seconds))
        return Orders(self.salt, assignments, reason, self.policy.window, bake)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values, as :meth:`from_mapping` reads them."""
        return {
            **asdict(self),
            "waves": [str(wave) for wave in self.waves],
            "members": list(self.members),
        }

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> Rollout:
        """The rollout that :meth:`to_mapping` wrote; of an older version, too."""
        other, goal = fields.get("other"), fields.get("goal")
        return cls(
            **{
                **fields,
                "release": Target(**fields["release"]),
                "previous": Target(**fields["previous"]),
                "other": Target(**other) if other else None,
                "waves": tuple(Wave.parse(wave) for wave in fields["waves"]),
                "policy": Policy.from_mapping(fields["policy"]),
                "members": tuple(fields.get("members", ())),
                "goal": Goal(**{**goal, "members": tuple(goal["members"])}) if goal else None,
                "told": tuple((float(at), int(count)) for at, count in fields.get("told", ())),
                "state": State(fields["state"]),
            }
        )


def check_allowed(rollout: Rollout, verb: Verb) -> None:
    """Refuse a verb that the rollout's state does not allow.

    Raises:
        RolloutError: names the states in which it is allowed.
    """
    if not allows(verb, rollout.state, rollout.wave):
        state = str(rollout.state) + (", and it never began" if rollout.wave < 0 else "")
        raise RolloutError(
            f"cannot {verb} rollout {rollout.id}: it is {state};"
            f" {verb} needs: {', '.join(sorted(ALLOWED[verb]))}"
        )


@dataclass(frozen=True)
class Decision:
    """The rollout as it now stands, what to tell the fleet (or nothing), and a line for the log."""

    rollout: Rollout
    orders: Orders | None = None
    line: str = ""
