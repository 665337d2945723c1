"""Bodies of the operator's requests, checked before anything is done with them."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from federation.enrolment import AUTHORISED_SECONDS, TOKEN_SECONDS
from federation.operators import Role
from federation.policy import OnSuccess, Policy, Retries
from federation.rate import Counting, Rate


class Strict(BaseModel):
    """A request body: unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid")


class TokenRequest(Strict):
    """A wish for an enrolment token."""

    device_id: str | None = None
    tags: dict[str, str] = Field(default_factory=dict, max_length=32)
    seconds: float = TOKEN_SECONDS


class KeyRequest(Strict):
    """A wish to authorise a device's public key, in PEM."""

    public_key: str = Field(max_length=4096)
    device_id: str | None = None
    tags: dict[str, str] = Field(default_factory=dict, max_length=32)
    seconds: float = AUTHORISED_SECONDS


class ReleaseRequest(Strict):
    """A signed release, all parts in base64; wrapped keys where it is encrypted."""

    metadata: str
    payload: str
    wraps: str = ""


class WrapsRequest(Strict):
    """Further wrapped keys of an encrypted release, in base64."""

    wraps: str


class RetriesRequest(Strict):
    """See :class:`federation.policy.Retries`."""

    device: int = Retries.device
    space: int = Retries.space
    carrier: int = Retries.carrier


class RateRequest(Strict):
    """Devices a minute; see :class:`federation.rate.Rate`."""

    per_minute: int
    factor: float = Rate.factor
    every: int = Rate.every
    counting: Counting = Rate.counting
    max_per_minute: int = Rate.max_per_minute


class PolicyRequest(Strict):
    """See :class:`federation.policy.Policy`."""

    max_failures: int = Policy.max_failures
    max_failure_share: float = Policy.max_failure_share
    max_unhealthy: int = Policy.max_unhealthy
    max_unhealthy_share: float = Policy.max_unhealthy_share
    max_memory_factor: float = Policy.max_memory_factor
    max_latency_factor: float = Policy.max_latency_factor
    max_load_factor: float | None = Policy.max_load_factor
    max_celsius: float | None = Policy.max_celsius
    min_battery_percent: float | None = Policy.min_battery_percent
    min_disk_bytes: float | None = Policy.min_disk_bytes
    min_memory_bytes: float | None = Policy.min_memory_bytes
    quality_tolerance: float = Policy.quality_tolerance
    quality_alpha: float = Policy.quality_alpha
    quality_clip: float = Policy.quality_clip
    liar_share: float = Policy.liar_share
    quality_margin: float | None = Policy.quality_margin
    min_success_share: float = Policy.min_success_share
    on_success: OnSuccess = Policy.on_success
    two_person: bool = Policy.two_person
    bake_seconds: float = Policy.bake_seconds
    deadline_seconds: float = Policy.deadline_seconds
    window: str = Field(default=Policy.window, max_length=11)
    retries: RetriesRequest = RetriesRequest()
    rate: RateRequest | None = None


class RolloutRequest(Strict):
    """A plan; waves as people write them: ``["1", "where connected == true", "100%"]``."""

    release: str
    other: str | None = None
    waves: list[Annotated[str, Field(max_length=1100)]] = Field(
        default=["1", "100%"], max_length=50
    )
    policy: PolicyRequest = PolicyRequest()
    why: str = Field(default="", max_length=500)
    draft: bool = False


class TagsRequest(Strict):
    """Tags to set; null takes one away."""

    tags: dict[str, str | None] = Field(max_length=64)
    why: str = Field(default="", max_length=500)


class OperatorRequest(Strict):
    """A wish for an operator's token."""

    name: str = Field(max_length=100)
    role: Role
    why: str = Field(default="", max_length=500)


class WhyRequest(Strict):
    """An operator's words for the audit log."""

    why: str = Field(default="", max_length=500)


class RevokeRequest(WhyRequest):
    """A device, or only one certificate of it by its serial (hex)."""

    serial: str | None = Field(default=None, pattern="^[0-9a-f]{1,64}$")
