"""Telling the devices of a wave at a rate: which ones come next. Pure, like the rollout.

At the start of a wave its whole reach is put aside as the goal. From then on, whenever
:func:`federation.rate.allowance` lets some devices pass, the reach grows by exactly so many of
those that are active, in the order of their buckets; both sides of a comparison grow from their
outer ends at the same pace. A device that shares its bucket with others whose turn has not come is
named. When nobody is left, the goal is the reach.

Devices that enrol where the reach has been already take the release at once, as in a rollout
without a rate; they are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from federation.orders import Observation
from federation.rate import Counting, allowance, recent
from federation.rollout_nouns import Goal, Rollout
from protos.messages import BUCKETS, bucket


def held_back(before: Rollout, wider: Rollout) -> Rollout:
    """A wave that has just begun, with the reach of the one before and its own as the goal."""
    return replace(
        wider,
        basis_points=before.basis_points,
        other_points=before.other_points,
        members=before.members,
        goal=Goal(wider.basis_points, wider.other_points, wider.members),
    )


def per_minute(rollout: Rollout, observations: Sequence[Observation]) -> int:
    """The rate in force, in devices a minute; 0 without one."""
    rate = rollout.policy.rate
    if rate is None:
        return 0
    succeeded = 0
    if rate.counting is Counting.SUCCEEDED:
        succeeded = sum(one.committed for one in observations if rollout.includes(one.device_id))
    return rate.now(rollout.notified, min(succeeded, rollout.notified))


def waiting(rollout: Rollout, observations: Sequence[Observation]) -> list[str]:
    """The devices of the current wave that are still to be told, the next one first."""
    goal = rollout.goal
    if goal is None:
        return []
    whole = replace(
        rollout,
        basis_points=goal.basis_points,
        other_points=goal.other_points,
        members=goal.members,
        goal=None,
    )
    left = [
        one.device_id
        for one in observations
        if whole.includes(one.device_id) and not rollout.includes(one.device_id)
    ]
    return sorted(left, key=lambda name: (_distance(rollout, name), name))


def further(rollout: Rollout, observations: Sequence[Observation], now: float) -> Rollout:
    """The rollout with the devices told that may be told now; as it was if there are none.

    Args:
        rollout: with a goal and a policy with a rate.
        observations: one for each active device.
        now: Unix seconds.
    """
    goal, told = rollout.goal, recent(rollout.told, now)
    if goal is None:
        return rollout
    most = allowance(per_minute(rollout, observations), told, now)
    if not most:
        return replace(rollout, told=told)
    left = waiting(rollout, observations)
    chosen = left[:most]
    if chosen:
        rollout = replace(
            _with(rollout, chosen, left[len(chosen) :]),
            notified=rollout.notified + len(chosen),
            wave_began=now,
        )
        told = recent(told, now, len(chosen))
    if len(chosen) < len(left):
        return replace(rollout, told=told)
    return replace(
        rollout,
        basis_points=goal.basis_points,
        other_points=goal.other_points,
        members=goal.members,
        goal=None,
        told=told,
    )


def _distance(rollout: Rollout, name: str) -> int:
    """Of a device's bucket from the outer end of its side."""
    place = bucket(rollout.salt, name)
    return place if rollout.arm(name) == 0 else BUCKETS - 1 - place


def _with(rollout: Rollout, chosen: Sequence[str], left: Sequence[str]) -> Rollout:
    """The rollout, reaching the chosen ones too and none of those that are left."""
    goal = rollout.goal
    picked = set(goal.members) if goal is not None else set()
    points = [rollout.basis_points, rollout.other_points]
    if goal is not None and (goal.basis_points, goal.other_points) != tuple(points):
        for side in (0, 1):
            mine = [name for name in chosen if rollout.arm(name) == side and name not in picked]
            stop = [_distance(rollout, name) for name in left if rollout.arm(name) == side]
            if mine:
                reach = _distance(rollout, mine[-1]) + 1
                points[side] = max(points[side], min([reach, *stop]))
    wider = replace(rollout, basis_points=points[0], other_points=points[1])
    named = [name for name in chosen if not wider.covers(name)]
    kept = [name for name in rollout.members if name in picked or not wider.covers(name)]
    return replace(wider, members=tuple(sorted({*kept, *named})))
