"""What a rollout tells the fleet, and what it hears back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from federation.policy import FailureClass, Retries
from protos import signed
from protos.members import pack_members
from protos.messages import DeviceEvent, Health, Quality, RejectReason

REASON_MAX = 1_000  # characters of a reason inside signed metadata

# Refusals that speak of the way to a device, of its clock or key, not of the release.
NOT_THE_RELEASE = frozenset(
    {
        RejectReason.METADATA_SIGNATURE,
        RejectReason.METADATA_ROLLBACK,
        RejectReason.METADATA_EXPIRED,
        RejectReason.METADATA_MALFORMED,
        RejectReason.CLOCK,
        RejectReason.CONTENT_KEY,  # wrapped to it later, the device takes the release
    }
)
CLASSES = {
    None: FailureClass.DEVICE,
    RejectReason.NO_SPACE: FailureClass.SPACE,
    RejectReason.PAYLOAD_DIGEST: FailureClass.CARRIER,
}
FAILURES = frozenset({DeviceEvent.REVERTED, DeviceEvent.REJECTED, DeviceEvent.FAILED})


@dataclass(frozen=True)
class Target:
    """A release as a round names it; the empty one is the base model without an adapter."""

    release: str = ""
    path: str = ""
    sha256: str = ""


BASE = Target()


@dataclass(frozen=True)
class Assignment:
    """Devices with a bucket below ``basis_points`` take the target.

    Attributes:
        basis_points: 0 to 10000.
        target: what they take.
        members: names of the only devices that are meant; None means all of them.
    """

    basis_points: int
    target: Target
    members: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Orders:
    """What a round tells the fleet; a device takes the first assignment that includes it.

    Attributes:
        salt: of the buckets.
        assignments: in order.
        reason: for people.
        window: when devices install, in their own time; empty: at any time.
        bake_seconds: for how long a device watches its health after an install.
    """

    salt: str
    assignments: tuple[Assignment, ...]
    reason: str
    window: str = ""
    bake_seconds: int = 0

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> Orders:
        """The orders that :func:`dataclasses.asdict` wrote."""
        assignments = tuple(
            Assignment(
                item["basis_points"],
                Target(**item["target"]),
                None if item.get("members") is None else tuple(item["members"]),
            )
            for item in fields["assignments"]
        )
        return cls(
            fields["salt"],
            assignments,
            fields["reason"],
            fields.get("window", ""),
            fields.get("bake_seconds", 0),
        )

    def to_document(self, sequence: int, rollout: str) -> signed.RoundDocument:
        """As the online key signs it."""
        return signed.RoundDocument(
            sequence=sequence,
            rollout=rollout,
            salt=self.salt,
            assignments=tuple(
                signed.Assignment(
                    one.basis_points,
                    one.target.path,
                    one.target.sha256,
                    None if one.members is None else pack_members(self.salt, one.members),
                )
                for one in self.assignments
            ),
            reason=self.reason[:REASON_MAX],
            window=self.window,
            bake_seconds=self.bake_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is known of one active device.

    Attributes:
        device_id: its name.
        outcome: its last word on this rollout's release, if any.
        reason: why, where it failed.
        attempts: how often it has failed by now, of the same release.
        quality: what it measured, where it did.
        health_before: how it was before the install, where it said so.
        health_after: how it was when it spoke last with the release.
        running: the release that serves there.
        facts: tags and inventory, as :mod:`federation.filters` reads them.
    """

    device_id: str
    outcome: DeviceEvent | None = None
    reason: RejectReason | None = None
    attempts: int = 1
    quality: Quality | None = None
    health_before: Health | None = None
    health_after: Health | None = None
    running: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def committed(self) -> bool:
        """Whether the release serves there."""
        return self.outcome is DeviceEvent.COMMITTED

    @property
    def failed(self) -> bool:
        """Whether the device could not or would not take the release, when it spoke last."""
        return self.outcome in FAILURES and self.reason not in NOT_THE_RELEASE

    def given_up(self, retries: Retries) -> bool:
        """Whether it has failed more often than its class of failure may try again."""
        kind = CLASSES.get(self.reason, FailureClass.RELEASE)
        if self.outcome is not DeviceEvent.FAILED and kind is FailureClass.DEVICE:
            kind = FailureClass.RELEASE
        return self.failed and self.attempts > retries.of(kind)
