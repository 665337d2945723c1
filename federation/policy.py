"""When a rollout goes on and when it stops, as the operator decides it."""

from __future__ import annotations

from dataclasses import dataclass

from federation.waves import RolloutError


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to go on and when to stop.

    Attributes:
        max_failures: devices that may fail before the rollout halts.
        quality_tolerance: how far the mean accuracy on the devices' own data may drop, in 0..1.
        bake_seconds: wait between the last device of a wave settling and the next wave.
        deadline_seconds: a device silent for so long after its wave began no longer blocks.
    """

    max_failures: int = 0
    quality_tolerance: float = 0.02
    bake_seconds: float = 0.0
    deadline_seconds: float = 3600.0

    def __post_init__(self) -> None:
        checks = {
            "max_failures (0 or more)": self.max_failures >= 0,
            "quality_tolerance (0 to 1)": 0 <= self.quality_tolerance <= 1,
            "bake_seconds (0 or more)": 0 <= self.bake_seconds < float("inf"),
            "deadline_seconds (above 0)": 0 < self.deadline_seconds < float("inf"),
        }
        for name, holds in checks.items():
            if not holds:
                given = getattr(self, name.split(" ")[0])
                raise RolloutError(f"policy: {name} cannot be {given!r}")
