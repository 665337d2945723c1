"""Where a rollout stands, for people and programs: who was reached, what they said, what follows.

Pure: from a rollout, the observations of its devices and the words that they sent with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from federation import pacing
from federation.comparison import compare
from federation.concerns import Concern, complaints, concerns
from federation.filters import Filter
from federation.judging import falls, quality_fall
from federation.orders import Observation
from federation.rate import seconds_needed
from federation.rollout_nouns import UNDER_WAY, Rollout, State


def standing(
    rollout: Rollout,
    observations: Sequence[Observation],
    words: Mapping[tuple[str, str], Mapping[str, Any]],
    *,
    where: Filter | None = None,
    troubled: bool = False,
    phases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that is known of a rollout, as ``RolloutStatus`` of the interface has it.

    Args:
        rollout: as stored.
        observations: one for each active device.
        words: a device's last word on a release, by (device, release).
        where: of the devices, list only those that it means; all are counted.
        troubled: of the devices, list only those that speak against the release.
        phases: how far devices have come that have given no word yet, by device.
    """
    phases = phases or {}
    started = rollout.wave >= 0
    reached = [one for one in observations if started and rollout.includes(one.device_id)]
    found = concerns(rollout.policy, reached, waiting=rollout.state in UNDER_WAY, phases=phases)
    inside = {one.device_id for one in reached}
    listed = [one for one in observations if where is None or where.matches(one.facts)]
    if troubled:
        listed = [one for one in listed if _troubled(rollout, one) and one.device_id in inside]
    return {
        "progress": _progress(rollout, observations, reached),
        "concerns": [_plain(one) for one in found],
        "pace": _pace(rollout, observations),
        **_quality(rollout, observations, inside),
        "devices": [
            {**_device(rollout, one, words, one.device_id in inside), "phase": _phase(one, phases)}
            for one in listed
        ],
    }


def _phase(one: Observation, phases: Mapping[str, str]) -> str:
    return phases.get(one.device_id, "") if one.outcome is None else ""


def _troubled(rollout: Rollout, one: Observation) -> bool:
    return one.failed or bool(complaints(rollout.policy, one))


def _plain(one: Concern) -> dict[str, Any]:
    return {**asdict(one), "kind": str(one.kind), "named": list(one.named)}


def _progress(
    rollout: Rollout, observations: Sequence[Observation], reached: Sequence[Observation]
) -> dict[str, int]:
    policy, names = rollout.policy, {target.release for target in rollout.targets}
    return {
        "fleet": len(observations),
        "reached": len(reached),
        "committed": sum(one.committed for one in reached),
        "running": sum(one.running in names for one in observations),
        "failed": sum(one.given_up(policy.retries) for one in reached),
        "worse_off": sum(bool(complaints(policy, one)) for one in reached),
        "allowed_failures": policy.allowed_failures(len(reached)),
        "allowed_unhealthy": policy.allowed_unhealthy(len(reached)),
    }


def _pace(rollout: Rollout, observations: Sequence[Observation]) -> dict[str, Any] | None:
    rate = rollout.policy.rate
    if rate is None or rollout.state not in (State.RUNNING, State.PAUSED):
        return None
    left = len(pacing.waiting(rollout, observations))
    # The first batch of those that are left still has to wait for the newest one's interval.
    needed = seconds_needed(rate, [0, left + 1], notified=rollout.notified)[1] if left else 0.0
    return {
        "per_minute": pacing.per_minute(rollout, observations),
        "rate": str(rate),
        "notified": rollout.notified,
        "waiting": left,
        "seconds_left": needed,
    }


def _quality(
    rollout: Rollout, observations: Sequence[Observation], inside: set[str]
) -> dict[str, Any]:
    """The evidence about each release, and the comparison where there are two."""
    policy = rollout.policy
    arms: list[list[Observation]] = [[] for _ in rollout.targets]
    for one in observations:
        if one.device_id in inside:
            arms[rollout.arm(one.device_id)].append(one)
    evidence = []
    for target, arm in zip(rollout.targets, arms, strict=True):
        found = quality_fall(policy, arm, len(arm), arms=len(arms))
        shown = {"release": target.release, "shown": found.shown, "reached": len(arm)}
        evidence.append({**shown, **asdict(found)})
    compared = None
    if rollout.other is not None:
        a, b = ([-fall for fall in falls(arm)] for arm in arms)
        compared = asdict(compare(a, b, clip=policy.clip, alpha=policy.quality_alpha))
    return {"evidence": evidence, "comparison": compared}


def _device(
    rollout: Rollout,
    one: Observation,
    words: Mapping[tuple[str, str], Mapping[str, Any]],
    in_wave: bool,
) -> dict[str, Any]:
    release = rollout.targets[rollout.arm(one.device_id)].release
    word = words.get((one.device_id, release), {})
    return {
        "device_id": one.device_id,
        "in_wave": in_wave,
        "release": release,
        "running": one.running,
        "outcome": one.outcome,
        "reason": one.reason,
        "attempts": one.attempts if one.failed else 0,
        "quality": asdict(one.quality) if one.quality else None,
        "complaints": [str(complaint) for complaint in complaints(rollout.policy, one)],
        "detail": word.get("detail", ""),
        "payload_bytes": word.get("payload_bytes", 0),
    }
