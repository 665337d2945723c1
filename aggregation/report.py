"""What one aggregation did: who was used, who was refused, and how far the result is from exact.

>>> report = AggregationReport(1, 2, {"c": "not-finite"}, 30.0,
...                            {"query": ModuleReport(2, 6, 5.0, 3.0, 0.0)})
>>> report.error, report.to_mapping()["modules"]["query"]["energy"]
(0.6, 0.64)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """How well one module's handed-out update stands for the exact one.

    Attributes:
        rank: rank of what is handed out.
        exact_rank: rank of the exact update (an upper bound, from the stacked factors).
        norm: Frobenius norm of the exact update.
        distance: Frobenius norm of exact minus handed out.
        dropped: Frobenius norm of the part that not even the residual keeps.
    """

    rank: int
    exact_rank: int
    norm: float
    distance: float
    dropped: float

    @property
    def error(self) -> float:
        """Distance / norm; 0 if the exact update is zero."""
        return self.distance / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """Share of the exact update's squared norm that is explained: 1 - error^2, at least 0."""
        return max(0.0, 1.0 - self.error**2)


@dataclass(frozen=True)
class AggregationReport:
    """One aggregation.

    Attributes:
        round: number of the round that it closed, from 1; of the last one if nobody was used.
        used: number of updates that entered.
        refused: reason by client.
        weight: sum of the weights that entered.
        modules: by module; empty if measuring was switched off or nobody was used.
        influence: by client, its share in the result: its weight in the mean, or what a robust
            rule made of it. The sum is 1, less where a rule clips; 0 is a client that was left
            out, or the trusted one. Of rules per coordinate it is the mean over the coordinates in
            which clients differ. Empty if nobody changed anything.
        unchanged: why the adapter had to stay as it was; empty if a round was made.
        measured: whether ``error`` and ``energy`` are known; a secure sum, for one, shows nobody
            the products that they would be measured against.
    """

    round: int
    used: int
    refused: Mapping[str, str]
    weight: float
    modules: Mapping[str, ModuleReport]
    influence: Mapping[str, float] = field(default_factory=dict)
    unchanged: str = ""
    measured: bool = True

    @property
    def error(self) -> float:
        """Relative Frobenius error over all modules together, handed out against exact."""
        norm = math.hypot(*(m.norm for m in self.modules.values()))
        return math.hypot(*(m.distance for m in self.modules.values())) / norm if norm else 0.0

    @property
    def energy(self) -> float:
        """Share of the exact update's squared norm that is handed out."""
        return max(0.0, 1.0 - self.error**2)

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "round": self.round,
            "used": self.used,
            "refused": dict(self.refused),
            "weight": self.weight,
            "error": self.error,
            "energy": self.energy,
            "influence": dict(self.influence),
            "unchanged": self.unchanged,
            "measured": self.measured,
            "modules": {
                name: {
                    "rank": m.rank,
                    "exact_rank": m.exact_rank,
                    "norm": m.norm,
                    "error": m.error,
                    "energy": m.energy,
                    "dropped": m.dropped,
                }
                for name, m in self.modules.items()
            },
        }
