"""Answers of the operator's interface, as ``/openapi.json`` describes them.

Times are Unix seconds unless a name says otherwise; an answer never holds a device's keys.
"""

from typing import Any

from pydantic import BaseModel, Field

from federation.api_bodies import PolicyRequest
from federation.comparison import Comparison
from federation.concerns import Concern
from federation.operators import Role
from federation.rollout_nouns import State


class Fault(BaseModel):
    """Why a call was refused."""

    code: str = Field(description="For programs: a closed word, or a reason of its subject.")
    message: str = Field(description="For people: what, where, and what to do.")


class ErrorAnswer(BaseModel):
    """The body of every answer that is not 2xx."""

    error: Fault


class HealthAnswer(BaseModel):
    """Whether the server works."""

    status: str
    trouble: str = Field(description="Why the last round is not published; empty: all is well.")
    gateway: str | None = Field(None, description="Which of several gateways answers.")
    decides: bool = Field(True, description="Whether this one decides about rollouts.")


class Target(BaseModel):
    """A release as rounds name it; empty fields are the base model without an adapter."""

    release: str
    path: str
    sha256: str


class Goal(BaseModel):
    """How far the current wave shall reach, while its devices are told at a rate."""

    basis_points: int
    other_points: int
    members: list[str]


class RolloutAnswer(BaseModel):
    """A rollout as stored."""

    id: str
    release: Target
    other: Target | None = Field(description="The second release of a comparison.")
    previous: Target
    waves: list[str]
    wave: int = Field(description="Index of the current wave; -1 before the start.")
    policy: PolicyRequest
    state: State
    why: str = Field(description="Why it is in this state.")
    needs_approval: bool
    started_by: str
    approved_by: str
    salt: str
    basis_points: int
    other_points: int
    members: list[str]
    goal: Goal | None = Field(description="Null: all of the current wave has been told.")
    notified: int = Field(description="Devices told, counted while the policy has a rate.")
    told: list[tuple[float, int]] = Field(description="The newest batches: when, and how many.")
    wave_began: float
    settled_at: float | None
    held: bool
    cleared: int
    created: float
    updated: float


class RolloutDevice(BaseModel):
    """One device in a rollout."""

    device_id: str
    in_wave: bool
    release: str
    running: str
    outcome: str | None
    phase: str = Field(
        description="Without an outcome: downloaded or staged; empty if it has not said so."
    )
    reason: str | None
    attempts: int
    quality: dict[str, Any] | None
    complaints: list[str] = Field(description="In what it is worse off than before the install.")
    detail: str
    payload_bytes: int


class Evidence(BaseModel):
    """What is known of a fall of accuracy; see federation.evidence."""

    release: str
    shown: bool
    reached: int
    devices: int
    trimmed: int
    mean: float
    capital: float
    needed: float


class Pace(BaseModel):
    """How fast the devices of the current wave are told."""

    per_minute: int = Field(description="The rate in force.")
    rate: str = Field(description="As it was set, for people.")
    notified: int = Field(description="Devices told by this rollout so far.")
    waiting: int = Field(description="Devices of the current wave still to be told.")
    seconds_left: float = Field(description="Until they have been told, at least.")


class Progress(BaseModel):
    """The devices told so far, counted; the same whatever filter ``devices`` was asked with."""

    fleet: int
    reached: int
    committed: int = Field(description="Of those told, how many have said that it serves.")
    running: int = Field(description="Of the fleet, how many run it now.")
    failed: int
    worse_off: int
    allowed_failures: int
    allowed_unhealthy: int


class RolloutStatus(RolloutAnswer):
    """A rollout with what each device said."""

    back_to: str = Field(description="What a roll-back brings; empty: the base model alone.")
    no_way_back: str = Field(description="Why devices would refuse that; empty: they would not.")
    trouble: str = Field(description="Why the fleet is not told of its last round; empty: it is.")
    progress: Progress
    concerns: list[Concern]
    pace: Pace | None
    evidence: list[Evidence]
    comparison: Comparison | None
    devices: list[RolloutDevice]


class Tagged(BaseModel):
    """A device."""

    id: str
    enrolled: float
    serial: str
    tags: dict[str, str]
    inventory: dict[str, Any]
    revoked: float | None
    last_seen: float | None
    last_sequence: int
    timestamp_version: int
    running: str
    before: str
    health: dict[str, Any] | None
    connected: bool
    metadata_hours: float | None = Field(
        None, description="For how long it has lacked newer metadata; null: it never said."
    )


class ReportLine(BaseModel):
    """One report of a device."""

    device_id: str
    sequence: int
    received: float
    event: str
    release: str
    rollout: str
    reason: str | None
    detail: str


class DeviceAnswer(Tagged):
    """A device with its newest reports."""

    reports: list[ReportLine]


class DevicesAnswer(BaseModel):
    """Devices by name, and the newest metadata that they could have."""

    devices: list[Tagged]
    timestamp_version: int


class EnrolmentAnswer(BaseModel):
    """What a device needs to enrol."""

    enrol: str
    fleet: str
    expires: float
    authority_pem: str


class TokenAnswer(EnrolmentAnswer):
    """Likewise, with the one-time token; no other answer ever holds it."""

    token: str


class AdaptersAnswer(BaseModel):
    """The current metadata of a channel's role, in base64, and the targets in use."""

    version: int
    metadata: str
    in_use: list[str]


class ReleaseAnswer(BaseModel):
    """A published release."""

    name: str
    target: str
    sha256: str
    length: int
    statement: dict[str, Any]


class AuditLine(BaseModel):
    """Who did what to what, when and why; the digest is over all lines before, too."""

    number: int
    at: float
    who: str
    action: str
    subject: str
    why: str
    digest: str


class AuditVerdict(BaseModel):
    """Whether the audit log is what was written."""

    sound: bool
    lines: int
    head: str
    broken_at: int | None
    seen: bool


class OperatorAnswer(BaseModel):
    """An operator; never the token."""

    name: str
    role: Role
    created: float
    revoked: float | None


class NewOperator(BaseModel):
    """A new operator; the only answer that ever holds the token."""

    name: str
    role: Role
    token: str


class Named(BaseModel):
    """Something by its name."""

    name: str


class Expiring(BaseModel):
    """When a metadata file expires; the time in ISO 8601."""

    role: str
    version: int
    expires: str


class OfflineAnswer(BaseModel):
    """What offline keys have signed, in base64 by role, and when each file expires."""

    files: dict[str, str]
    expiries: list[Expiring]


class VersionsAnswer(BaseModel):
    """The newest version of each metadata file, by role."""

    versions: dict[str, int]


class RevokedAnswer(BaseModel):
    """The releases that a revocation was new for."""

    revoked: list[str]


class CertificatesAnswer(BaseModel):
    """Certificates of active devices (PEM), by name; their encryption keys are in them."""

    certificates: dict[str, str]


class WrapsAnswer(BaseModel):
    """The wrapped content keys of one payload."""

    sha256: str
    keys: int
    wraps: str = Field(description="The file beside the payload, in base64.")


class WrapsAdded(BaseModel):
    """What a release's wrapped keys have become."""

    added: int
    keys: int
