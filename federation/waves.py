"""Who gets a release when: waves over a fleet that is ordered by stable hash buckets.

A wave says how far a release may reach, as a number of devices or a percentage of the fleet, or of
those devices that a filter means. Without a filter, what a device hears is only ``basis_points``:
it computes its own bucket (:func:`protos.messages.bucket`) and compares. The fleet is ordered by
bucket, so that a wider wave contains every narrower one. Devices that a filter has picked are named
(:mod:`protos.members`), and stay picked.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from federation.errors import FederationError
from federation.filters import Filter
from protos.messages import BUCKETS, bucket

SALTS_TRIED = 64
WAVES_MAX = 50
_EXPONENTIAL = re.compile(r"([0-9]+(?:\.[0-9]+)?)(%?) *x *([0-9]+(?:\.[0-9]+)?)\Z", re.ASCII)


class RolloutError(FederationError):
    """A rollout that cannot be made, or a verb that its state does not allow."""


@dataclass(frozen=True)
class Wave:
    """How far a release reaches: a count or a percentage, of the fleet or of a part of it.

    Attributes:
        count: a number of devices, at least 1.
        percent: of the active fleet, more than 0 and up to 100, rounded up to whole devices.
        where: a filter (:mod:`federation.filters`) that says which devices; None: the fleet.
    """

    count: int | None = None
    percent: float | None = None
    where: Filter | None = None

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

        >>> str(Wave.parse("1")), Wave.parse("12.5%").percent
        ('1', 12.5)
        >>> str(Wave.parse('where tag.site == "lab"'))
        '100% where tag.site == "lab"'

        Raises:
            RolloutError: neither a whole number nor a percentage.
            FilterError: a filter that cannot be read.
        """
        word, has_filter, condition = f" {text.strip()}".partition(" where ")
        word = word.strip()
        where = Filter.parse(condition) if has_filter else None
        try:
            if has_filter and not word:
                return cls(percent=100.0, where=where)
            if word.endswith("%"):
                return cls(percent=float(word[:-1]), where=where)
            return cls(count=int(word), where=where)
        except ValueError:
            raise RolloutError(
                f"wave {text!r} is neither a number of devices (3) nor a percentage (25%), nor one"
                ' of these for a part of the fleet (1 where tag.site == "lab")'
            ) from None

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        size = str(self.count)
        if self.percent is not None:
            short = f"{self.percent:g}"  # six digits; a plan is stored as it is written here
            size = f"{short if float(short) == self.percent else repr(self.percent)}%"
        return size if self.where is None else f"{size} where {self.where}"

    @property
    def everybody(self) -> bool:
        """Whether devices that enrol later belong to it too."""
        return self.percent == 100 and self.where is None

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
    if len(waves) > WAVES_MAX:
        raise RolloutError(f"{len(waves)} waves, at most {WAVES_MAX}")
    for earlier, later in itertools.pairwise(wave for wave in waves if wave.where is None):
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


def parse_plan(words: Sequence[str], fleet: int) -> tuple[Wave, ...]:
    """The waves of a plan as people write it; ``1x2`` and ``1%x2`` grow exponentially to 100%.

    >>> [str(wave) for wave in parse_plan(["1x3"], fleet=20)]
    ['1', '3', '9', '100%']
    >>> [str(wave) for wave in parse_plan(["where connected == true", "10%x3"], fleet=20)]
    ['100% where connected == true', '10%', '30%', '90%', '100%']

    Args:
        words: one for each wave, or for each run of waves.
        fleet: number of active devices.

    Raises:
        RolloutError: not a wave, or an impossible plan.
        FilterError: a filter that cannot be read.
    """
    waves: list[Wave] = []
    for word in words:
        match = _EXPONENTIAL.match(word.strip())
        if match is None:
            waves.append(Wave.parse(word))
            continue
        size, factor = float(match[1]), float(match[3])
        if not factor > 1 or not size > 0:
            raise RolloutError(f"wave {word!r}: it grows by a factor above 1, such as 1x2")
        end = 100.0 if match[2] else float(fleet)
        while size < end and len(waves) < WAVES_MAX:
            waves.append(Wave(percent=round(size, 4)) if match[2] else Wave(count=math.ceil(size)))
            size *= factor
        waves.append(Wave(percent=100.0))
    return check_waves(waves)


def pick(wave: Wave, matching: Collection[str], salt: str) -> tuple[str, ...]:
    """The devices that a wave with a filter reaches, of those that its filter means."""
    ordered = sorted(matching, key=lambda name: (bucket(salt, name), name))
    return tuple(ordered[: wave.size(len(ordered))])


def reach(wave: Wave, devices: Collection[str], salt: str) -> int:
    """Basis points that take in the wave's number of these devices.

    Devices that share the bucket of the last one come along, since a device knows its bucket only;
    :func:`choose_salt` avoids that where it can.
    """
    if wave.everybody:
        return BUCKETS
    return reach_of(wave.size(len(devices)), devices, salt)


def reach_of(size: int, devices: Collection[str], salt: str) -> int:
    """Basis points that take in so many of these devices."""
    if size == 0:
        return 0
    return sorted(bucket(salt, device) for device in devices)[size - 1] + 1


def choose_salt(
    name: str, waves: Sequence[Wave], devices: Collection[str], *, balanced_at: int | None = None
) -> str:
    """A salt under which each wave reaches exactly its number of the devices known now.

    With ``balanced_at``, a bucket, half of the devices shall lie below it: two releases are
    compared on equal numbers.

    Deterministic in its arguments. In a fleet too large for buckets of their own (beyond some
    hundred devices at a boundary), the salt with the fewest devices too many.
    """

    def excess(salt: str) -> int:
        total = 0
        if balanced_at is not None:
            below = sum(bucket(salt, device) < balanced_at for device in devices)
            return abs(2 * below - len(devices)) - len(devices) % 2
        for wave in waves:
            if wave.where is not None:
                continue
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
