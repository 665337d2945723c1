"""What speaks against a release on the devices that were reached, grouped by reason. Pure.

A device is *worse off* where its own reports say that a measure is out of bounds with the release
and was not before it. Memory and latency have bounds by default; the other measures depend on what
else a device does, so that they count only where the policy gives them a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from federation.orders import Observation
from federation.policy import Policy
from protos.messages import Health

MEMORY_SLACK_BYTES = 64 * 1024 * 1024  # growth that is never held against a release
LATENCY_SLACK_MS = 20.0
LOAD_SLACK = 2.0  # processes
SILENT = "silent"  # of a device that was told, and has said nothing of the release
NAMED_MAX = 20  # devices of a concern that are named


class Complaint(StrEnum):
    """In what a device is worse off."""

    LATENCY = "latency"  # the median time of a request has grown
    MEMORY = "memory"  # the process has grown
    LOAD = "load"  # more processes wait for the processor
    HEAT = "heat"  # the hottest sensor
    BATTERY = "battery"  # what is left of it
    DISK = "disk"  # what is free
    FREE_MEMORY = "free-memory"  # what the whole device has left


class Kind(StrEnum):
    """What a concern means for the rollout."""

    FAILED = "failed"  # counts against the allowed failures
    WORSE_OFF = "worse off"  # counts against the allowed unhealthy devices
    RETRYING = "may try again"  # failed, and its class of failure may
    WAITING = "no answer yet"  # told, and silent so far


@dataclass(frozen=True, kw_only=True)
class Concern:
    """Devices with the same trouble.

    Attributes:
        kind: what it means.
        reason: from a closed vocabulary: of refusals, of events, or :class:`Complaint`.
        devices: how many; one with several complaints counts for each.
        named: the first few of them.
    """

    kind: Kind
    reason: str
    devices: int
    named: tuple[str, ...]


def complaints(policy: Policy, one: Observation) -> tuple[Complaint, ...]:
    """What has grown out of bounds on a device with the release."""
    if one.outcome is None:
        return ()
    found = []
    quality, before, after = one.quality, one.health_before, one.health_after
    if quality is not None and quality.latency_ms_before > 0:
        bound = policy.max_latency_factor * quality.latency_ms_before + LATENCY_SLACK_MS
        if quality.latency_ms_after > bound:
            found.append(Complaint.LATENCY)
    if one.committed and before is not None and after is not None:
        found += [kind for kind in Complaint if _is_worse(policy, kind, before, after)]
    return tuple(found)


def concerns(
    policy: Policy,
    reached: Sequence[Observation],
    *,
    waiting: bool = True,
    phases: Mapping[str, str] | None = None,
) -> list[Concern]:
    """What speaks against the release, by kind and reason, the most frequent first.

    Args:
        policy: its bounds and retries.
        reached: the devices that were told, in any order.
        waiting: whether a device without an answer is a concern.
        phases: how far devices without an answer have come, by name; the others are silent.
    """
    found: dict[tuple[Kind, str], list[str]] = {}
    for one in reached:
        phase = (phases or {}).get(one.device_id, SILENT)
        for kind, reason in _of(policy, one, waiting, phase):
            found.setdefault((kind, reason), []).append(one.device_id)
    order = list(Kind)
    rows = [
        Concern(kind=k, reason=r, devices=len(names), named=tuple(sorted(names)[:NAMED_MAX]))
        for (k, r), names in found.items()
    ]
    return sorted(rows, key=lambda row: (order.index(row.kind), -row.devices, row.reason))


def _of(policy: Policy, one: Observation, waiting: bool, phase: str) -> list[tuple[Kind, str]]:
    found = [(Kind.WORSE_OFF, str(complaint)) for complaint in complaints(policy, one)]
    if one.failed:
        kind = Kind.FAILED if one.given_up(policy.retries) else Kind.RETRYING
        found.append((kind, str(one.reason or one.outcome)))
    elif waiting and not one.committed:
        found.append((Kind.WAITING, str(one.reason or one.outcome or phase)))
    return found


def _is_worse(policy: Policy, kind: Complaint, before: Health, after: Health) -> bool:
    """Whether one measure is out of bounds after the install, and was not before."""
    match kind:
        case Complaint.MEMORY:
            bound = policy.max_memory_factor * before.process_memory_bytes + MEMORY_SLACK_BYTES
            return after.process_memory_bytes > bound
        case Complaint.LOAD:
            factor = policy.max_load_factor
            return factor is not None and after.load_1min > factor * before.load_1min + LOAD_SLACK
        case Complaint.HEAT:
            was, now = before.temperature_celsius, after.temperature_celsius
            return _crossed(policy.max_celsius, was, now, above=True)
        case Complaint.BATTERY:
            return _crossed(
                policy.min_battery_percent, before.battery_percent, after.battery_percent
            )
        case Complaint.DISK:
            return _crossed(policy.min_disk_bytes, before.disk_free_bytes, after.disk_free_bytes)
        case Complaint.FREE_MEMORY:
            was, now = before.memory_available_bytes, after.memory_available_bytes
            return _crossed(policy.min_memory_bytes, was, now)
        case Complaint.LATENCY:
            return False  # measured by the probe, not by the device's health


def _crossed(
    bound: float | None, before: float | None, now: float | None, *, above: bool = False
) -> bool:
    if bound is None or now is None:
        return False
    sign = 1 if above else -1
    return sign * now > sign * bound and (before is None or sign * before <= sign * bound)
