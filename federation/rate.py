"""How fast a release may reach devices: so many a minute, steady or growing. Pure numbers.

A rate bounds how many devices are *told* of a release in any minute, as AWS IoT Jobs do with their
constant and exponential rollout rates: a base rate, a factor by which it grows, what must have
happened for it to grow (devices notified, or devices that succeeded), and a maximum. When a device
installs is its own affair: its window, its lock, its retries.

    >>> steady = Rate(per_minute=30)
    >>> allowance(steady.now(0, 0), (), 0.0)
    5
    >>> allowance(steady.now(5, 5), ((0.0, 5),), 10.0), allowance(30, ((0.0, 30),), 59.0)
    (5, 0)
    >>> growing = Rate(per_minute=10, factor=2.0, every=50, counting=Counting.SUCCEEDED)
    >>> growing.now(notified=500, succeeded=49), growing.now(notified=500, succeeded=100)
    (10, 40)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from federation.waves import RolloutError

MINUTE = 60.0  # seconds
BETWEEN = 10.0  # seconds; a round for each single device would cost a large fleet dearly
RATE_MAX = 100_000  # devices a minute
FACTOR_MAX = 10.0


class Counting(StrEnum):
    """Which devices make a rate grow."""

    NOTIFIED = "notified"  # told of the release by this rollout
    SUCCEEDED = "succeeded"  # of those, the ones on which it serves


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Devices a minute, constant or exponential.

    Attributes:
        per_minute: devices that may be told of the release within any 60 seconds, to begin with.
        factor: by which that grows; 1: it is constant.
        every: it grows whenever so many more devices have been counted; 0 if it is constant.
        counting: which devices are counted.
        max_per_minute: it never grows beyond this.
    """

    per_minute: int
    factor: float = 1.0
    every: int = 0
    counting: Counting = Counting.NOTIFIED
    max_per_minute: int = 1000

    def __post_init__(self) -> None:
        grows = self.factor > 1
        checks = {
            f"per_minute (1 to {RATE_MAX})": 1 <= self.per_minute <= RATE_MAX,
            f"factor (1 to {FACTOR_MAX:g})": 1 <= self.factor <= FACTOR_MAX,
            "every (1 or more where factor is above 1, else 0)": self.every >= 1
            if grows
            else self.every == 0,
            "counting (notified or succeeded)": self.counting in tuple(Counting),
            f"max_per_minute (per_minute to {RATE_MAX})": not grows
            or self.per_minute <= self.max_per_minute <= RATE_MAX,
        }
        for name, holds in checks.items():
            if not holds:
                given = getattr(self, name.split(" ")[0])
                raise RolloutError(f"policy: rate.{name} cannot be {given!r}")

    def __str__(self) -> str:
        """For people.

        >>> str(Rate(per_minute=5, factor=1.5, every=20, max_per_minute=80))
        '5 devices a minute, times 1.5 for every 20 notified, at most 80'
        """
        base = f"{self.per_minute} device{'s' * (self.per_minute != 1)} a minute"
        if self.factor == 1:
            return base
        grown = f"times {self.factor:g} for every {self.every} {self.counting}"
        return f"{base}, {grown}, at most {self.max_per_minute}"

    def now(self, notified: int, succeeded: int) -> int:
        """Devices a minute after so many were notified and so many succeeded; never falls in both.

        Args:
            notified: devices told of the release by this rollout.
            succeeded: of those, the ones on which it serves.
        """
        if self.factor == 1:
            return self.per_minute
        steps = (notified if self.counting is Counting.NOTIFIED else succeeded) // self.every
        enough = math.log(RATE_MAX) / math.log(self.factor)  # and no overflow beyond it
        grown = float(self.per_minute * self.factor ** min(steps, enough))
        return min(self.max_per_minute, math.floor(grown + 1e-9))

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> Rate:
        """The rate that :func:`dataclasses.asdict` wrote."""
        return cls(**{**fields, "counting": Counting(fields.get("counting", Counting.NOTIFIED))})


def allowance(per_minute: int, told: Sequence[tuple[float, int]], now: float) -> int:
    """How many more devices may be told now.

    Never more than ``per_minute`` within any 60 seconds, whatever the pauses between two calls; and
    spread over the minute: at most one batch in ten seconds, of a sixth of the rate.

    Args:
        per_minute: the rate in force.
        told: (Unix seconds, devices) of the batches before, in order; none in the future.
        now: Unix seconds.
    """
    between = max(BETWEEN, MINUTE / per_minute)
    elapsed = now - told[-1][0] if told else between
    if elapsed < between:
        return 0
    # A tick comes a little late, a server that was down much later: only the first is made up for.
    due = math.floor(per_minute * min(elapsed, 2 * between) / MINUTE + 1e-9)
    used = sum(count for at, count in told if now - at < MINUTE)
    return max(0, min(due, per_minute - used))


def recent(
    told: Sequence[tuple[float, int]], now: float, more: int = 0
) -> tuple[tuple[float, int], ...]:
    """The batches that still matter, with one more if ``more`` devices are told now.

    A clock that was set back must not stop a rollout: what seems to lie ahead counts as now.

    >>> recent(((0.0, 5), (90.0, 5), (500.0, 1)), 100.0, more=2)
    ((90.0, 5), (100.0, 1), (100.0, 2))
    """
    kept = [(min(at, now), count) for at, count in told]
    if more:
        kept = [(at, count) for at, count in kept if now - at < MINUTE]
        kept.append((now, more))
    return tuple(kept)


def seconds_needed(rate: Rate, waves: Sequence[int], *, notified: int = 0) -> list[float]:
    """How long it takes to tell each wave's devices, one wave after the other, at least.

    Devices are taken to succeed at once, and the server to look exactly when a batch is due.

    >>> seconds_needed(Rate(per_minute=6), [1, 6])
    [0.0, 60.0]

    Args:
        rate: as set.
        waves: devices that each wave adds.
        notified: devices that have been told before.
    """
    now, told, needed = 0.0, tuple[tuple[float, int], ...](), []
    for added in waves:
        began, left = now, added
        while left > 0:
            speed = rate.now(notified, notified)
            more = min(left, allowance(speed, told, now))
            if more:
                told = recent(told, now, more)
                left, notified = left - more, notified + more
            if left:
                now += max(BETWEEN, MINUTE / rate.now(notified, notified)) if more else 1.0
        needed.append(now - began)
    return needed
