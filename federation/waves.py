"""Who gets a release when: waves over a fleet that is ordered by stable hash buckets.

A wave says how far a release may reach, as a number of devices or a percentage of the fleet. What a
device hears is only ``basis_points``: it computes its own bucket (:func:`protos.messages.bucket`)
and compares. The fleet is ordered by bucket, so that a wider wave contains every narrower one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from federation.errors import FederationError
from protos.messages import BUCKETS, bucket

SALTS_TRIED = 64


class RolloutError(FederationError):
    """A rollout that cannot be made, or a verb that its state does not allow."""


@dataclass(frozen=True)
class Wave:
    """How far a release reaches: exactly one of the two is given.

    Attributes:
        count: a number of devices, at least 1.
        percent: of the active fleet, more than 0 and up to 100, rounded up to whole devices.
    """

    count: int | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.percent is None):
            raise RolloutError("a wave has either a count or a percent, for example 1 or 25%")
        if self.count is not None and self.count < 1:
            raise RolloutError(f"wave {self.count}: a count is 1 or more")
        if self.percent is not None and not 0 < self.percent <= 100:
            raise RolloutError(f"wave {self.percent:g}%: a percentage is above 0, up to 100")

    @classmethod
    def parse(cls, text: str) -> Wave:
        """A wave as people write it.

        >>> Wave.parse("1"), Wave.parse("12.5%")
        (Wave(count=1, percent=None), Wave(count=None, percent=12.5))

        Raises:
            RolloutError: neither a whole number nor a percentage.
        """
        word = text.strip()
        try:
            if word.endswith("%"):
                return cls(percent=float(word[:-1]))
            return cls(count=int(word))
        except ValueError:
            raise RolloutError(
                f"wave {text!r} is neither a number of devices (3) nor a percentage (25%)"
            ) from None

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        return f"{self.percent:g}%" if self.percent is not None else str(self.count)

    @property
    def everybody(self) -> bool:
        """Whether devices that enrol later belong to it too."""
        return self.percent == 100

    def size(self, fleet: int) -> int:
        """How many of ``fleet`` active devices it means, never more than there are.

        >>> Wave(percent=10).size(20), Wave(percent=1).size(20), Wave(count=50).size(20)
        (2, 1, 20)
        """
        if self.count is not None:
            return min(self.count, fleet)
        return math.ceil((self.percent or 0.0) / 100 * fleet)


def check_waves(waves: Sequence[Wave]) -> tuple[Wave, ...]:
    """Refuse what cannot be a plan.

    Raises:
        RolloutError: no wave, percentages or counts that shrink, or a last wave which isn't 100%.
    """
    if not waves:
        raise RolloutError("no waves given; for example: 1 25% 100%")
    for earlier, later in itertools.pairwise(waves):
        shrinks = (
            earlier.percent is not None
            and later.percent is not None
            and later.percent <= earlier.percent
        ) or (
            earlier.count is not None and later.count is not None and later.count <= earlier.count
        )
        if shrinks or earlier.everybody:
            raise RolloutError(f"wave {later} does not reach further than wave {earlier} before it")
    if not waves[-1].everybody:
        raise RolloutError(f"the last wave must be 100%, not {waves[-1]}")
    return tuple(waves)


def reach(wave: Wave, devices: Collection[str], salt: str) -> int:
    """Basis points that take in the wave's number of these devices.

    Devices that share the bucket of the last one come along, since a device knows its bucket only;
    :func:`choose_salt` avoids that where it can.
    """
    if wave.everybody:
        return BUCKETS
    size = wave.size(len(devices))
    if size == 0:
        return 0
    return sorted(bucket(salt, device) for device in devices)[size - 1] + 1


def choose_salt(name: str, waves: Sequence[Wave], devices: Collection[str]) -> str:
    """A salt under which each wave reaches exactly its number of the devices known now.

    Deterministic in its arguments. In a fleet too large for buckets of their own (beyond some
    hundred devices at a boundary), the salt with the fewest devices too many.
    """

    def excess(salt: str) -> int:
        total = 0
        for wave in waves:
            points = reach(wave, devices, salt)
            inside = sum(bucket(salt, device) < points for device in devices)
            total += inside - wave.size(len(devices))
        return total

    best, least = "", -1
    for attempt in range(SALTS_TRIED if len(devices) <= 1000 else 1):
        salt = f"{name}-{attempt}"
        found = excess(salt)
        if found == 0:
            return salt
        if least < 0 or found < least:
            best, least = salt, found
    return best
