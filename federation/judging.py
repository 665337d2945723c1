"""What the devices' words mean for a rollout: halt, wait, hold, or go on. Pure, like the rollout.

Three thresholds can halt it, each with its own line in the log: installs that failed, devices that
are worse off than before (:mod:`federation.concerns`), and accuracy on the devices' own data
(:mod:`federation.evidence`). Three can hold it back at the end of a wave: too few devices serve the
release, its harmlessness is not shown yet, or nobody serves it at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from federation.concerns import complaints
from federation.evidence import Evidence, fall_shown, no_fall_shown
from federation.orders import Observation
from federation.policy import Policy


def reason_to_halt(
    policy: Policy, arms: Sequence[Sequence[Observation]], reached: Sequence[int]
) -> str:
    """Why the rollout must not go on; empty where nothing speaks against it.

    Args:
        policy: the operator's thresholds.
        arms: what is known of the devices reached, by the release that they are to take: one arm
            for a plain rollout, two for a comparison. No others: whoever was not reached may say
            what it likes, and the share of liars is one of those reached.
        reached: how many devices of each arm have been reached by now.
    """
    everybody, total = [one for arm in arms for one in arm], sum(reached)
    failed = [one for one in everybody if one.given_up(policy.retries)]
    allowed = policy.allowed_failures(total)
    if len(failed) > allowed:
        reasons = sorted({str(one.reason or one.outcome) for one in failed})
        return f"{len(failed)} devices failed ({', '.join(reasons)}), {allowed} allowed"
    ill = [why for one in everybody if (why := complaints(policy, one))]
    allowed = policy.allowed_unhealthy(total)
    if len(ill) > allowed:
        reasons = sorted({str(one) for why in ill for one in why})
        return f"{len(ill)} devices are worse off ({', '.join(reasons)}), {allowed} allowed"
    for arm, size in zip(arms, reached, strict=True):
        found = quality_fall(policy, arm, size, arms=len(arms))
        if found.shown:
            return (
                f"mean accuracy falls by {found.mean:.4f} on {found.devices} devices"
                f" ({found.trimmed} more left out as possible lies), {policy.quality_tolerance:.4f}"
                f" allowed; shown at error rate {policy.quality_alpha:g}"
            )
    return ""


def quality_fall(
    policy: Policy, arm: Sequence[Observation], reached: int, *, arms: int = 1
) -> Evidence:
    """The evidence that accuracy falls by more than the tolerance in one arm."""
    return fall_shown(
        falls(arm),
        above=policy.quality_tolerance,
        clip=policy.clip,
        liars=policy.liars(reached),
        alpha=policy.quality_alpha / arms,
    )


def falls(observations: Sequence[Observation]) -> list[float]:
    """How far accuracy fell on each device that has measured it."""
    return [
        one.quality.accuracy_before - one.quality.accuracy_after
        for one in observations
        if one.outcome is not None and one.quality is not None and one.quality.examples > 0
    ]


def still_out(policy: Policy, reached: Sequence[Observation]) -> list[Observation]:
    """Devices that have neither committed nor finally failed."""
    return [one for one in reached if not one.committed and not one.given_up(policy.retries)]


def reason_to_hold(policy: Policy, arms: Sequence[Sequence[Observation]]) -> str:
    """Why a wave that has settled is no success; empty if it is one.

    Args:
        policy: the operator's thresholds.
        arms: the devices reached, by the release that they are to take.
    """
    if not any(arms):
        return "no device is reached; abort, and choose another wave"
    for arm in arms:
        committed = sum(one.committed for one in arm)
        if arm and committed == 0:
            return "nobody in the wave runs the release"
        if committed < policy.min_success_share * len(arm):
            return (
                f"{committed} of {len(arm)} devices run the release,"
                f" {policy.min_success_share:.0%} asked for"
            )
        if policy.quality_margin is not None:
            found = no_fall_shown(
                falls(arm),
                below=policy.quality_margin,
                clip=policy.clip,
                liars=policy.liars(len(arm)),
                alpha=policy.quality_alpha / len(arms),
            )
            if not found.shown:
                return (
                    f"it is not shown that accuracy falls by less than {policy.quality_margin:g}:"
                    f" {found.devices} devices, capital {found.capital:.3g} of"
                    f" {found.needed:.3g}"
                )
    return ""
