"""The nouns that cross the wire, free of protobuf, and their conversion at the door.

``to_wire`` and ``from_wire`` are the only places where generated classes meet domain code;
``from_wire`` checks while it converts and refuses what is out of bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class RejectReason(StrEnum):
    """Why a device refused a release: the closed vocabulary of ``fleet.proto``."""

    METADATA_SIGNATURE = "metadata-signature"
    METADATA_ROLLBACK = "metadata-rollback"
    METADATA_EXPIRED = "metadata-expired"
    METADATA_MALFORMED = "metadata-malformed"
    ROLES_DISAGREE = "roles-disagree"
    DOWNGRADE = "downgrade"
    WRONG_BASE = "wrong-base"
    UNSUPPORTED_RUNTIME = "unsupported-runtime"
    PAYLOAD_DIGEST = "payload-digest"
    PAYLOAD_MALFORMED = "payload-malformed"
    GUARD = "guard"
    KNOWN_BAD = "known-bad"
    QUALITY_REGRESSED = "quality-regressed"
    SELF_TEST = "self-test"
    NO_SPACE = "no-space"
    CLOCK = "clock"


class DeviceEvent(StrEnum):
    """What a device says it did."""

    STARTED = "started"
    DOWNLOADED = "downloaded"
    STAGED = "staged"
    COMMITTED = "committed"
    REVERTED = "reverted"
    REJECTED = "rejected"
    FAILED = "failed"
    HEALTH = "health"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a device is, as it says at enrolment."""

    agent_version: str = ""
    base_digest: str = ""
    runtime: str = ""
    memory_bytes: int = 0
    cpu_count: int = 0
    platform: str = ""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Accuracy on the device's own held-out examples, and the median latency of one request."""

    examples: int
    accuracy_before: float
    accuracy_after: float
    latency_ms_before: float = 0.0
    latency_ms_after: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Health:
    """State of the device at one moment; ``battery_percent`` is None where there is no battery."""

    memory_available_bytes: int
    process_memory_bytes: int
    disk_free_bytes: int
    load_1min: float
    battery_percent: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """One thing that a device did. ``sequence`` grows by one and is never reused."""

    device_id: str
    sequence: int
    time_unix_ms: int
    event: DeviceEvent
    release: str = ""
    rollout: str = ""
    round_sequence: int = 0
    reason: RejectReason | None = None
    detail: str = ""
    quality: Quality | None = None
    health: Health | None = None
    payload_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class SignedReport:
    """A report's exact bytes and the device's signature over them."""

    body: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class EnrolRequest:
    """A one-time token and a PKCS#10 certificate request (PEM)."""

    token: str
    certificate_request: bytes
    inventory: Inventory = field(default_factory=Inventory)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EnrolReply:
    """The device's name, its certificate and the two roots that it trusts from now on."""

    device_id: str
    certificate: bytes
    authority: bytes
    root: bytes


@dataclass(frozen=True)
class MetadataBundle:
    """Files of the metadata repository by name; self-verifying, so any carrier will do."""

    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Heartbeat:
    """The server is there; its clock is a hint, never trusted."""

    server_time_unix_ms: int
