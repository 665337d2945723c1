"""What trust speaks of: the device, what it believes, and what it is to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clients.errors import ClientError
from protos.messages import RejectReason
from protos.signed import SignedPayload


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What this device is, as far as releases ask.

    Attributes:
        device_id: its name; with a round's salt it gives the bucket.
        base_digest: ``sha256:<hex>`` of the base model that it serves.
        runtime: its kind of inference engine, such as ``torch``.
        agent_built_unix: when its software was built, seconds since 1970: no clock of its own
            is believed to be before that.
        machine: its processor's architecture, as ``uname -m`` names it; empty if not known.
        memory_mib: its physical memory; 0 if not known.
    """

    device_id: str
    base_digest: str
    runtime: str
    agent_built_unix: int = 0
    machine: str = ""
    memory_mib: int = 0


@dataclass(frozen=True, kw_only=True)
class SignedRelease(SignedPayload):
    """A release that both roles agree on, with the order that brought it.

    Attributes:
        rollout: name of the rollout that ordered it.
        sequence: of the round that ordered it.
        window: when to install it, in the device's own time; empty: at any time.
        bake_seconds: for how long the device watches its health afterwards.
    """

    rollout: str
    sequence: int
    window: str = ""
    bake_seconds: int = 0

    @property
    def channel(self) -> str:
        """Its line of releases."""
        return self.statement.channel

    @property
    def counter(self) -> int:
        """Its number in the channel."""
        return self.statement.counter

    @property
    def plain_length(self) -> int:
        """Bytes of the decoded payload: the decoder's hard cap."""
        return self.statement.plain_length

    @property
    def adapter_digest(self) -> str:
        """Digest that the decoded adapter must have."""
        return self.statement.adapter_digest

    @property
    def spec_digest(self) -> str:
        """Digest that its specification must have."""
        return self.statement.spec_digest

    @property
    def base_digest(self) -> str:
        """The base model that it fits."""
        return self.statement.base_digest


@dataclass(frozen=True)
class Believed:
    """Verified content: the targets file, and each delegated role's targets."""

    targets: Any
    delegated: Mapping[str, Any]

    def role_of(self, target: str) -> str | None:
        """The delegated role that lists a target and may, by path and order of delegation."""
        for role, terminating in self._asked(target):
            if role in self.delegated and target in self.delegated[role].targets:
                return role
            if terminating:
                return None
        return None

    def speaker(self, target: str) -> str | None:
        """The role that may list a target before any other, whether it does or not."""
        return next((role for role, _ in self._asked(target)), None)

    def _asked(self, target: str) -> Iterator[tuple[str, bool]]:
        if self.targets.delegations is not None:
            yield from self.targets.delegations.get_roles_for_target(target)


@dataclass(frozen=True)
class Install:
    """Serve this release; the agent does nothing if it serves already."""

    release: SignedRelease


@dataclass(frozen=True)
class Stay:
    """Leave things as they are."""

    reason: str


@dataclass(frozen=True)
class Withdraw:
    """Serve the base model without an adapter."""

    rollout: str
    sequence: int
    reason: str


Verdict = Install | Stay | Withdraw


class Rejected(ClientError):  # noqa: N818  (named as devices report it)
    """An order that this device does not follow; what serves goes on serving.

    Attributes:
        reason: from the closed vocabulary of ``fleet.proto``.
        detail: for people.
        release: name of the release in question, empty if it never came to that.
        rollout: name of the rollout, empty if it never came to that.
        sequence: of the round, 0 if it never came to that.
    """

    def __init__(
        self,
        reason: RejectReason,
        detail: str,
        release: str = "",
        rollout: str = "",
        sequence: int = 0,
    ) -> None:
        super().__init__(f"{release or 'metadata'} rejected ({reason.value}): {detail}")
        self.reason = reason
        self.detail = detail
        self.release = release
        self.rollout = rollout
        self.sequence = sequence
