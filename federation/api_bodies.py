"""Bodies of the operator's requests, checked before anything is done with them."""

from pydantic import BaseModel, ConfigDict, Field

from federation.enrolment import AUTHORISED_SECONDS, TOKEN_SECONDS
from federation.policy import Policy


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
    """A signed release, both parts in base64."""

    metadata: str
    payload: str


class PolicyRequest(Strict):
    """See :class:`federation.rollout.Policy`."""

    max_failures: int = Policy.max_failures
    quality_tolerance: float = Policy.quality_tolerance
    bake_seconds: float = Policy.bake_seconds
    deadline_seconds: float = Policy.deadline_seconds


class RolloutRequest(Strict):
    """A plan; waves as people write them: ``["1", "25%", "100%"]``."""

    release: str
    waves: list[str] = Field(default=["1", "100%"], max_length=50)
    policy: PolicyRequest = PolicyRequest()
    why: str = Field(default="", max_length=500)
    draft: bool = False


class WhyRequest(Strict):
    """An operator's words for the audit log."""

    why: str = Field(default="", max_length=500)


class RevokeRequest(WhyRequest):
    """A device, or only one certificate of it by its serial (hex)."""

    serial: str | None = Field(default=None, pattern="^[0-9a-f]{1,64}$")
