"""The nouns that cross the wire, free of protobuf, and the rules that both sides share.

``to_wire`` and ``from_wire`` (written in :mod:`protos.conversion`, offered here) are the only
places where generated classes meet domain code; ``from_wire`` checks while it converts and refuses
what is out of bounds.

Which devices a round reaches is a rule of the wire too, since both sides must compute the same:
:func:`bucket`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

BUCKETS = 10_000  # one bucket is one basis point of the fleet


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
    HEALTH_REGRESSED = "health-regressed"
    CONTENT_KEY = "content-key"


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
    """State of the device at one moment; None where there is no battery, or no sensor of heat."""

    memory_available_bytes: int
    process_memory_bytes: int
    disk_free_bytes: int
    load_1min: float
    battery_percent: int | None = None
    temperature_celsius: float | None = None


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


@dataclass(frozen=True, kw_only=True)
class ReportBatch:
    """Signed reports of one device, oldest first; safe to send again."""

    reports: tuple[SignedReport, ...]


@dataclass(frozen=True)
class ReportAck:
    """Every report of the device up to this sequence is durable at the server."""

    accepted_through: int


@dataclass(frozen=True, kw_only=True)
class WatchRequest:
    """What the device has already seen, so that the server can tell who lags behind."""

    timestamp_version: int = 0
    root_version: int = 0
    running_release: str = ""


@dataclass(frozen=True)
class FetchRequest:
    """A file of the repository (an opaque key) and the first byte wanted."""

    path: str
    offset: int = 0


@dataclass(frozen=True)
class ContentKeyRequest:
    """The payload whose content key is wanted, by its SHA-256 as hex."""

    sha256: str


@dataclass(frozen=True)
class ContentKeyReply:
    """A content key wrapped to the device that asked, see :mod:`protos.wraps`."""

    wrapped: bytes


def bucket(salt: str, device_id: str) -> int:
    """The bucket of a device in one rollout, in 0..9999.

    Stable for a salt, so that a wave which grows only ever adds devices; independent between
    salts, so that no device is always the first.

    >>> bucket("spring", "d-1") == bucket("spring", "d-1"), 0 <= bucket("spring", "d-1") < BUCKETS
    (True, True)
    """
    digest = hashlib.sha256(f"{salt}:{device_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def encode_report(report: Report) -> bytes:
    """The very bytes that the device signs and the server keeps (a serialised ReportBody).

    >>> one = Report(device_id="d-1", sequence=1, time_unix_ms=0, event=DeviceEvent.STARTED)
    >>> decode_report(encode_report(one)) == one
    True
    """
    from protos.conversion import encode_report as encode

    return encode(report)


def decode_report(body: bytes) -> Report:
    """The report in a signed body; check the signature over ``body`` first.

    Raises:
        WireError: not a ReportBody, or a field out of bounds.
    """
    from protos.conversion import decode_report as decode

    return decode(body)


def to_wire(noun: Any) -> Any:
    """The protobuf message of a noun; a bundle and a heartbeat become a ``WatchEvent``.

    >>> from_wire(to_wire(FetchRequest("targets/00.x", 7)))
    FetchRequest(path='targets/00.x', offset=7)

    Raises:
        TypeError: not a noun of this module.
    """
    from protos.conversion import to_wire as convert

    return convert(noun)


def from_wire(message: Any) -> Any:
    """The noun in a protobuf message, every field checked against its bound.

    Raises:
        WireError: a field out of bounds; the text names it.
        TypeError: not a message of ``fleet.proto``.
    """
    from protos.conversion import from_wire as convert

    return convert(message)
