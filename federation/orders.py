"""What a rollout tells the fleet, and what it hears back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protos import signed
from protos.messages import DeviceEvent, Quality, RejectReason

REASON_MAX = 1_000  # characters of a reason inside signed metadata

# Refusals that speak of the way to a device or of its clock, not of the release.
NOT_THE_RELEASE = frozenset(
    {
        RejectReason.METADATA_SIGNATURE,
        RejectReason.METADATA_ROLLBACK,
        RejectReason.METADATA_EXPIRED,
        RejectReason.METADATA_MALFORMED,
        RejectReason.CLOCK,
    }
)
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
    """Devices with a bucket below ``basis_points`` take the target."""

    basis_points: int
    target: Target


@dataclass(frozen=True)
class Orders:
    """What a round tells the fleet; a device takes the first assignment that includes it."""

    salt: str
    assignments: tuple[Assignment, ...]
    reason: str

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> Orders:
        """The orders that :func:`dataclasses.asdict` wrote."""
        assignments = tuple(
            Assignment(item["basis_points"], Target(**item["target"]))
            for item in fields["assignments"]
        )
        return cls(fields["salt"], assignments, fields["reason"])

    def to_document(self, sequence: int, rollout: str) -> signed.RoundDocument:
        """As the online key signs it."""
        return signed.RoundDocument(
            sequence=sequence,
            rollout=rollout,
            salt=self.salt,
            assignments=tuple(
                signed.Assignment(one.basis_points, one.target.path, one.target.sha256)
                for one in self.assignments
            ),
            reason=self.reason[:REASON_MAX],
        )


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is known of one active device.

    Attributes:
        device_id: its name.
        outcome: its last word on this rollout's release, if any.
        reason: why, where it failed.
        quality: what it measured, where it did.
        running: the release that serves there.
    """

    device_id: str
    outcome: DeviceEvent | None = None
    reason: RejectReason | None = None
    quality: Quality | None = None
    running: str = ""

    @property
    def committed(self) -> bool:
        """Whether the release serves there."""
        return self.outcome is DeviceEvent.COMMITTED

    @property
    def failed(self) -> bool:
        """Whether the device could not or would not take the release."""
        return self.outcome in FAILURES and self.reason not in NOT_THE_RELEASE
