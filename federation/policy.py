"""When a rollout goes on and when it stops, as the operator decides it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from federation.rate import Rate
from federation.waves import RolloutError
from protos.errors import WireError
from protos.window import Window

DAY = 86_400.0  # seconds; within one day every time zone's window has opened


class OnSuccess(StrEnum):
    """What follows when a wave has settled well and baked."""

    ADVANCE = "advance"
    PAUSE = "pause"  # so that something outside can be looked at; resume goes on


class FailureClass(StrEnum):
    """Why a device did not take a release, as far as trying again may help."""

    RELEASE = "release"  # the release itself, or its fit to the device: never
    DEVICE = "device"  # something of the device's own: memory, a file, its network
    SPACE = "space"  # its disk is full
    CARRIER = "carrier"  # the bytes arrived damaged; an honest carrier may bring them yet


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often a device may try again before its failure counts, by class."""

    device: int = 2
    space: int = 2
    carrier: int = 2

    def of(self, kind: FailureClass) -> int:
        """Retries of a class; none where the release itself is at fault."""
        return 0 if kind is FailureClass.RELEASE else int(getattr(self, kind.value))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to go on and when to stop. Shares and accuracies lie in 0..1, times are seconds.

    Attributes:
        max_failures: devices whose install may fail before the rollout halts.
        max_failure_share: the same as a share of the devices reached; the larger one holds. To be
            safe from lying devices it must be at least ``liar_share``.
        max_unhealthy: devices that may be worse off (:mod:`federation.concerns`) before it halts.
        max_unhealthy_share: the same as a share of the devices reached; the larger one holds.
        max_memory_factor: a device whose process has grown by more than this is unhealthy.
        max_latency_factor: likewise for the median latency of a request.
        max_load_factor: likewise for the load of a minute; None: it doesn't count.
        max_celsius: a device that is hotter than this, and was not before, is unhealthy; None: it
            doesn't count. So with ``min_battery_percent`` of charge left, ``min_disk_bytes`` free
            and ``min_memory_bytes`` available on the whole device.
        quality_tolerance: how far the mean accuracy on the devices' own data may fall; the
            rollout halts when a larger fall is shown, see :mod:`federation.evidence`.
        quality_alpha: chance of halting a release that is within the tolerance, ever.
        quality_clip: a device's fall counts as much as this at most; twice the tolerance if that
            is more.
        liar_share: share of the devices reached that may report anything.
        quality_margin: a wave goes on only when it is shown that accuracy falls by less than
            this, with the same error rate; None asks for no proof.
        min_success_share: of the devices reached, so many must serve the release, or it pauses.
        on_success: see :class:`OnSuccess`.
        two_person: whether a second operator must approve what goes beyond the first wave.
        bake_seconds: wait between the last device of a wave settling and the next wave; the
            devices themselves watch their health for as long.
        deadline_seconds: a device silent for so long no longer blocks.
        window: when devices install, in their own time zone: ``22:00-05:00``; they download at
            once. Empty: at any time.
        retries: by class of failure.
        rate: how many devices a minute are told; None: a wave is told at once.
    """

    max_failures: int = 0
    max_failure_share: float = 0.0
    max_unhealthy: int = 1
    max_unhealthy_share: float = 0.05
    max_memory_factor: float = 3.0
    max_latency_factor: float = 10.0
    max_load_factor: float | None = None
    max_celsius: float | None = None
    min_battery_percent: float | None = None
    min_disk_bytes: float | None = None
    min_memory_bytes: float | None = None
    quality_tolerance: float = 0.02
    quality_alpha: float = 0.05
    quality_clip: float = 0.1
    liar_share: float = 0.05
    quality_margin: float | None = None
    min_success_share: float = 0.0
    on_success: OnSuccess = OnSuccess.ADVANCE
    two_person: bool = False
    bake_seconds: float = 0.0
    deadline_seconds: float = 3600.0
    window: str = ""
    retries: Retries = field(default_factory=Retries)
    rate: Rate | None = None

    def __post_init__(self) -> None:
        margin, clip = self.quality_margin, self.quality_clip
        checks = {
            "max_failures (0 or more)": self.max_failures >= 0,
            "max_failure_share (0 to 1)": 0 <= self.max_failure_share <= 1,
            "max_unhealthy (0 or more)": self.max_unhealthy >= 0,
            "max_unhealthy_share (0 to 1)": 0 <= self.max_unhealthy_share <= 1,
            "max_memory_factor (above 1)": 1 < self.max_memory_factor < math.inf,
            "max_latency_factor (above 1)": 1 < self.max_latency_factor < math.inf,
            "max_load_factor (above 1)": _within(self.max_load_factor, 1),
            "max_celsius (above 0)": _within(self.max_celsius, 0),
            "min_battery_percent (above 0, up to 100)": _within(self.min_battery_percent, 0, 100),
            "min_disk_bytes (above 0)": _within(self.min_disk_bytes, 0),
            "min_memory_bytes (above 0)": _within(self.min_memory_bytes, 0),
            "quality_tolerance (0 to 1)": 0 <= self.quality_tolerance <= 1,
            "quality_alpha (above 0, below 1)": 0 < self.quality_alpha < 1,
            "quality_clip (above 0, up to 1)": 0 < clip <= 1,
            "liar_share (0 to 0.45)": 0 <= self.liar_share <= 0.45,
            "quality_margin (above 0, below quality_clip)": margin is None or 0 < margin < clip,
            "min_success_share (0 to 1)": 0 <= self.min_success_share <= 1,
            "on_success (advance or pause)": self.on_success in tuple(OnSuccess),
            "bake_seconds (0 or more)": 0 <= self.bake_seconds < math.inf,
            "deadline_seconds (above 0)": 0 < self.deadline_seconds < math.inf,
            "retries (0 or more each)": all(n >= 0 for n in asdict(self.retries).values()),
        }
        for name, holds in checks.items():
            if not holds:
                given = getattr(self, name.split(" ")[0])
                raise RolloutError(f"policy: {name} cannot be {given!r}")
        if self.window:
            try:
                Window.parse(self.window)
            except WireError as error:
                raise RolloutError(f"policy: {error}") from None

    @property
    def patience(self) -> float:
        """Seconds after which a silent device no longer blocks; a window must have opened once."""
        return self.deadline_seconds + (DAY if self.window else 0.0)

    @property
    def clip(self) -> float:
        """The clip in force: a tolerance must lie well within it."""
        return max(self.quality_clip, 2 * self.quality_tolerance)

    def allowed_failures(self, reached: int) -> int:
        """Failures among so many devices that do not halt."""
        return max(self.max_failures, math.floor(self.max_failure_share * reached))

    def allowed_unhealthy(self, reached: int) -> int:
        """Unhealthy devices among so many that do not halt."""
        return max(self.max_unhealthy, math.floor(self.max_unhealthy_share * reached))

    def liars(self, reached: int) -> int:
        """How many of so many devices may lie."""
        return math.floor(self.liar_share * reached)

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> Policy:
        """The policy that :func:`dataclasses.asdict` wrote; of an older version, too."""
        given = dict(fields)
        rate = given.get("rate")
        return cls(
            **{
                **given,
                "on_success": OnSuccess(given.get("on_success", OnSuccess.ADVANCE)),
                "retries": Retries(**given.get("retries", {})),
                "rate": Rate.from_mapping(rate) if rate else None,
            }
        )


def _within(given: float | None, above: float, most: float = math.inf) -> bool:
    return given is None or (above < given <= most and given < math.inf)
