"""What a rollout would do to how many devices, before anything does. Pure; nothing is stored.

The waves are widened by the very code that widens a rollout under way, over the devices known now,
so the numbers are those that a start at this moment would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from federation.evidence import blind_band, fall_shown, no_fall_shown
from federation.orders import Observation
from federation.policy import Policy
from federation.published import ReleaseRecord
from federation.rate import seconds_needed
from federation.rollout import widen
from federation.rollout_nouns import Rollout
from federation.waves import choose_salt

NAMED_MAX = 20  # devices of a wave that are named
SILENT_HOURS = 24.0
PROOF_MAX = 2_000  # reports looked at when asking how many a proof needs

Unreadable = Callable[[ReleaseRecord], Collection[str]]


@dataclass(frozen=True, kw_only=True)
class PlannedWave:
    """One wave.

    Attributes:
        wave: as people write it.
        added: devices that it reaches and the waves before did not, for each release.
        reached: devices reached by its end.
        devices: the names of the first few that are added.
        settled: of those added, how many run the release already.
        unfit: of those added, how many will refuse it: another base model, another engine.
        unreadable: of those added, how many lack the key of an encrypted release: they wait for it.
        silent: of those added, how many have not been seen for a day: they wait for the deadline.
        download_bytes: of all that are added, at most.
        allowed_failures: failed devices by its end that do not halt.
        liars: devices by its end whose word about quality is allowed to be a lie.
        telling_seconds: until all of its devices have been told, at the rate; 0 without one.
    """

    wave: str
    added: tuple[int, ...]
    reached: int
    devices: tuple[str, ...]
    settled: int
    unfit: int
    unreadable: int
    silent: int
    download_bytes: int
    allowed_failures: int
    liars: int
    telling_seconds: float = 0.0


@dataclass(frozen=True)
class Duration:
    """How long a plan takes, in seconds, if nobody pauses it and nothing halts it.

    Attributes:
        telling: for each wave, until all of its devices have been told.
        at_least: every device takes the release at once.
        at_most: in every wave, one of the last devices is silent until it is let be.
    """

    telling: tuple[float, ...]
    at_least: float
    at_most: float


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What would happen.

    Attributes:
        releases: one, or the two of a comparison.
        previous: what the others keep, and all come back to; empty for the base model.
        fleet: active devices.
        waves: in order.
        fall_reports: honest reports of a fall at the clip after which it halts; None: never.
        proof_reports: reports of no fall that the margin asks for; None without a margin.
        rate: how fast devices are told, for people; empty: a wave is told at once.
        at_least_seconds: until it is done, see :class:`Duration`.
        at_most_seconds: likewise.
        blind_band: a fall beyond the tolerance by less than this can be hidden by the liars.
        warnings: what an operator should look at first.
    """

    releases: tuple[str, ...]
    previous: str
    fleet: int
    waves: tuple[PlannedWave, ...]
    fall_reports: int | None
    proof_reports: int | None
    blind_band: float
    rate: str
    at_least_seconds: float
    at_most_seconds: float
    warnings: tuple[str, ...]


def preview(
    rollout: Rollout,
    observations: Sequence[Observation],
    records: Sequence[ReleaseRecord],
    unreadable: Unreadable = lambda record: (),
    no_way_back: str = "",
) -> Preview:
    """Walk through the waves of a draft.

    Args:
        rollout: not started.
        observations: one for each active device.
        records: of the releases, in the order of ``rollout.targets``.
        unreadable: names of the devices that lack the key of a release.
        no_way_back: why devices would refuse the release before; empty if they would not.
    """
    blind = [frozenset(unreadable(record)) for record in records]
    names = [one.device_id for one in observations]
    at = rollout.halves[0] if rollout.other is not None else None
    rollout = replace(rollout, salt=choose_salt(rollout.id, rollout.waves, names, balanced_at=at))
    waves, inside = [], set[str]()
    moved = 0
    for _ in rollout.waves:
        rollout = widen(rollout, observations)
        if rollout.wave == 0:
            moved = _moved(rollout, observations)
        now = {name for name in names if rollout.includes(name)}
        fresh = [one for one in observations if one.device_id in now - inside]
        waves.append(_wave(rollout, fresh, len(now), records, blind))
        inside = now
    policy = rollout.policy
    takes = duration(policy, [sum(wave.added) for wave in waves])
    waves = [
        replace(wave, telling_seconds=telling)
        for wave, telling in zip(waves, takes.telling, strict=True)
    ]
    return Preview(
        releases=tuple(target.release for target in rollout.targets),
        previous=rollout.previous.release,
        fleet=len(names),
        waves=tuple(waves),
        fall_reports=_needed(policy, len(rollout.targets), fall=True),
        proof_reports=_needed(policy, len(rollout.targets), fall=False),
        rate=str(policy.rate) if policy.rate else "",
        at_least_seconds=takes.at_least,
        at_most_seconds=takes.at_most,
        blind_band=blind_band(policy.clip, policy.liar_share),
        warnings=(
            *([f"there is no way back from it: {no_way_back}"] if no_way_back else []),
            *_moving(rollout, moved),
            *_warnings(waves, policy, _needed(policy, len(rollout.targets), fall=False)),
        ),
    )


def duration(policy: Policy, added: Sequence[int]) -> Duration:
    """How long the waves take.

    Args:
        policy: its rate, bake time and deadline count.
        added: devices that each wave adds.
    """
    telling = [0.0] * len(added)
    if policy.rate is not None:
        telling = seconds_needed(policy.rate, added)
    at_least = math.fsum(telling) + len(added) * policy.bake_seconds
    return Duration(tuple(telling), at_least, at_least + len(added) * policy.patience)


def _wave(
    rollout: Rollout,
    fresh: Sequence[Observation],
    reached: int,
    records: Sequence[ReleaseRecord],
    blind: Sequence[frozenset[str]],
) -> PlannedWave:
    arms = [rollout.arm(one.device_id) for one in fresh]
    owed = [(one, records[arm]) for one, arm in zip(fresh, arms, strict=True)]
    settled = [one.running == record.name for one, record in owed]
    policy = rollout.policy
    return PlannedWave(
        wave=str(rollout.waves[rollout.wave]),
        added=tuple(arms.count(side) for side in range(len(records))),
        reached=reached,
        devices=tuple(sorted(one.device_id for one in fresh)[:NAMED_MAX]),
        settled=sum(settled),
        unfit=sum(not _fits(one, record) for one, record in owed),
        unreadable=sum(one.device_id in blind[arm] for one, arm in zip(fresh, arms, strict=True)),
        silent=sum(_is_silent(one) for one in fresh),
        download_bytes=sum(
            record.length for (_, record), has in zip(owed, settled, strict=True) if not has
        ),
        allowed_failures=policy.allowed_failures(reached),
        liars=policy.liars(reached),
    )


def _fits(one: Observation, record: ReleaseRecord) -> bool:
    base, runtime = one.facts.get("base_digest"), one.facts.get("runtime")
    statement = record.statement
    return base in (None, "", statement.base_digest) and (
        not runtime or runtime in statement.runtime
    )


def _moved(rollout: Rollout, observations: Sequence[Observation]) -> int:
    """Devices outside the first wave that run something else than what the fleet is said to have.

    After an abort, a comparison, or where a device was enrolled while nothing was under way.
    """
    others = [one for one in observations if not rollout.includes(one.device_id)]
    return sum(one.running != rollout.previous.release for one in others)


def _moving(rollout: Rollout, moved: int) -> list[str]:
    if not moved:
        return []
    return [
        f"devices outside the first wave are told to take"
        f" {rollout.previous.release or 'the base model alone'} at the start; {moved} of them run"
        " something else now"
    ]


def _is_silent(one: Observation) -> bool:
    hours = one.facts.get("silent_hours")
    return not one.facts.get("connected") and hours is not None and hours > SILENT_HOURS


def _needed(policy: Policy, arms: int, *, fall: bool) -> int | None:
    """Reports, all alike and at their most telling, that make the claim; None where none do."""
    alpha, margin, clip = policy.quality_alpha / arms, policy.quality_margin, policy.clip
    if not fall and margin is None:
        return None

    def enough(count: int) -> bool:
        liars = policy.liars(count)
        if fall:
            above = policy.quality_tolerance
            return fall_shown(
                [clip] * count, above=above, clip=clip, liars=liars, alpha=alpha
            ).shown
        zeros = [0.0] * count
        below = margin or math.inf
        return no_fall_shown(zeros, below=below, clip=clip, liars=liars, alpha=alpha).shown

    return next((count for count in range(1, PROOF_MAX) if enough(count)), None)


def _warnings(waves: Sequence[PlannedWave], policy: Policy, proof: int | None) -> list[str]:
    found = []
    for number, wave in enumerate(waves, 1):
        name = f"wave {number} ({wave.wave})"
        if not wave.reached:
            found.append(f"{name} reaches nobody: the rollout would pause there")
        elif not sum(wave.added):
            found.append(f"{name} adds no device to the waves before")
        if wave.unfit:
            found.append(f"{name}: {wave.unfit} devices have another base model or engine")
        if wave.unreadable:
            found.append(
                f"{name}: {wave.unreadable} devices lack the key of an encrypted release: "
                "airpeft release wrap"
            )
        if wave.silent:
            found.append(f"{name}: {wave.silent} devices have been silent for a day")
    if proof is not None and waves[0].reached < proof:
        found.append(
            f"quality_margin {policy.quality_margin:g} needs {proof} reports without any fall;"
            f" the first wave reaches {waves[0].reached} devices and would pause"
        )
    return found
