"""What ``airpeft rollout plan`` and ``start`` take, and the policy that it makes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from federation.errors import FederationError

HEALTH = {
    "memory": "max_memory_factor",
    "latency": "max_latency_factor",
    "load": "max_load_factor",
    "heat": "max_celsius",
    "battery": "min_battery_percent",
    "disk": "min_disk_bytes",
    "free-memory": "min_memory_bytes",
}
RETRIES = ("device", "space", "carrier")


class Counted(StrEnum):
    """Which devices make a rate grow."""

    NOTIFIED = "notified"
    SUCCEEDED = "succeeded"


Waves = Annotated[
    list[str] | None,
    typer.Option(
        "--wave",
        help="Devices (1), share (25%), growth (1x2, 1%x2), each also of a part of the fleet"
        ' (25% where tag.site == "north"); repeatable; the last is 100%.',
    ),
]
RatePerMinute = Annotated[
    int | None,
    typer.Option("--rate", help="Devices that are told in a minute, at most; else a wave at once."),
]
RateFactor = Annotated[
    float, typer.Option(help="A rate that grows: multiplied by this (1.1 to 10) at each step.")
]
RateEvery = Annotated[int, typer.Option(help="A step is so many more devices counted.")]
RateCounting = Annotated[
    Counted, typer.Option(help="What is counted: devices told, or those of them that run it.")
]
RateMax = Annotated[int, typer.Option(help="A rate that grows never exceeds this.")]
UnhealthyIf = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=LIMIT",
        help="When a device is worse off: memory=3, latency=10, load=4 (factors of before); heat=85"
        " (Celsius); battery=20 (percent left); disk=1e9, free-memory=5e8 (bytes left). Memory and"
        " latency always count; repeatable.",
    ),
]
RetriesOption = Annotated[
    list[str] | None,
    typer.Option("--retries", metavar="CLASS=COUNT", help="Of device, space, carrier; repeatable."),
]


def rate_of(
    rate: int | None, factor: float, every: int, counting: Counted, most: int
) -> dict[str, Any] | None:
    """The rate, as the server's interface takes it.

    Raises:
        FederationError: growth without a rate, or half of it.
    """
    if rate is None:
        if factor != 1 or every:
            raise FederationError("--rate-factor and --rate-every need --rate N as well")
        return None
    if (factor != 1) != (every != 0):
        raise FederationError(
            "a rate that grows needs --rate-factor and --rate-every, as: --rate 10"
            " --rate-factor 2 --rate-every 50"
        )
    return {
        "per_minute": rate,
        "factor": factor,
        "every": every,
        "counting": counting.value,
        "max_per_minute": most,
    }


def health_of(given: list[str] | None) -> dict[str, float]:
    """The policy's bounds on health.

    >>> health_of(["heat=85", "disk=1e9"])
    {'max_celsius': 85.0, 'min_disk_bytes': 1000000000.0}

    Raises:
        FederationError: no such measure, or no number.
    """
    found = {}
    for text in given or []:
        name, _, limit = text.partition("=")
        try:
            found[HEALTH[name]] = float(limit)
        except (KeyError, ValueError):
            raise FederationError(
                f"--unhealthy-if {text!r} is not of the form NAME=LIMIT with a name of"
                f" {', '.join(HEALTH)} and a number"
            ) from None
    return found


def retries_of(given: list[str] | None) -> dict[str, int]:
    """Retries by class of failure.

    Raises:
        FederationError: no such class, or no number.
    """
    found = {}
    for text in given or []:
        kind, _, count = text.partition("=")
        if kind not in RETRIES or not count.isdecimal():
            raise FederationError(
                f"--retries {text!r} is not of the form device=2, space=2 or carrier=2"
            )
        found[kind] = int(count)
    return found
