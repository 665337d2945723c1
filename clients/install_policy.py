"""What is asked of a release before it serves, and how an install may end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from aggregation import guard
from clients.watch import WatchPolicy
from protos.messages import DeviceEvent


class Outcome(StrEnum):
    """How an install ended."""

    COMMITTED = "committed"
    REFUSED = "refused"  # never again
    WAITING = "waiting"  # staged; for its window, or for the device's lock
    LATER = "later"  # something that may pass


@dataclass(frozen=True, kw_only=True)
class InstallPolicy:
    """What a device asks of a release before it serves it.

    Attributes:
        quality_tolerance: accuracy on the own held-out data may fall by this much (0 to 1), and
            by one example in any case. A release older than the running one is an operator's
            roll-back: it is measured and reported, but not refused for its quality.
        max_payload_bytes: no larger payload is fetched.
        max_attempts: tries of one release, counted over restarts: what kills the process that
            loads it is given up.
        fetch_tries: consecutive cuts, without a byte between them, before the link is given up.
        guard: limits of the guard.
        watch: what counts as worse after the commit.
    """

    quality_tolerance: float = 0.05
    max_payload_bytes: int = 64 << 20
    max_attempts: int = 3
    fetch_tries: int = 4
    guard: guard.GuardLimits = field(default_factory=guard.GuardLimits)
    watch: WatchPolicy = field(default_factory=WatchPolicy)


class Tell(Protocol):
    """Puts one report into the queue."""

    def __call__(self, event: DeviceEvent, **fields: Any) -> bool:
        """Report an event; whether it is on disk already.

        The fields are those of :class:`protos.messages.Report`.
        """
