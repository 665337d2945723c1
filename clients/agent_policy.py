"""How an agent waits."""

from __future__ import annotations

from dataclasses import dataclass, field

from clients.install_policy import InstallPolicy


@dataclass(frozen=True, kw_only=True)
class AgentPolicy:
    """How an agent waits.

    Attributes:
        install: what is asked of a release.
        health_seconds: between two health reports.
        reconnect: bounds of the back-off after a lost link, seconds.
        later: bounds of the back-off before something that may pass is tried again, seconds.
    """

    install: InstallPolicy = field(default_factory=InstallPolicy)
    health_seconds: float = 300.0
    reconnect: tuple[float, float] = (0.5, 60.0)
    later: tuple[float, float] = (30.0, 3600.0)
