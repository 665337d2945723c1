"""What comes out of the demo, and what of it should not have happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from simulations.server_app import RunResult

PARITY = 1e-4
"""Largest difference of a logit that still counts as the same: float32 in another order."""


@dataclass
class Attack:
    """One thing that had to fail.

    Attributes:
        name: what was tried.
        refused: whether it failed, everywhere.
        reason: word of the closed vocabulary that the devices gave.
        detail: what happened, for people.
    """

    name: str
    refused: bool
    reason: str
    detail: str


@dataclass
class DemoResult:
    """What came out.

    Attributes:
        run: the training run.
        devices: what is known of each device, by name.
        releases: what was released, in order.
        attacks: what had to fail.
        traffic: requests, failures and slowest answer over all devices.
        parity: largest difference between what PEFT computes from the run folder and what the
            devices serve.
    """

    run: RunResult
    devices: dict[str, dict[str, Any]] = field(default_factory=dict)
    releases: list[dict[str, Any]] = field(default_factory=list)
    attacks: list[Attack] = field(default_factory=list)
    traffic: dict[str, Any] = field(default_factory=dict)
    parity: float = float("nan")

    @property
    def problems(self) -> list[str]:
        """What should not have happened; empty if all went as it must."""
        found = [
            f"the attack succeeded: {a.name} ({a.detail})" for a in self.attacks if not a.refused
        ]
        if self.traffic.get("failed"):
            found.append(f"{self.traffic['failed']} requests failed: {self.traffic['errors']}")
        if not self.parity < PARITY:
            found.append(f"PEFT and the devices disagree by {self.parity}")
        return found
