"""What a mechanism did, as a value that any accountant can read.

    >>> event = SgdEvent(noise_multiplier=1.1, sample_rate=0.1, steps=20, max_grad_norm=1.0)
    >>> SgdEvent.from_mapping(event.to_mapping()) == event
    True

An event holds public facts only: nothing in it depends on the content of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from privacy.budget import BudgetError

KIND = "poisson-gaussian-sgd"


@dataclass(frozen=True, kw_only=True)
class SgdEvent:
    """Some steps of DP-SGD with Poisson sampling (Abadi et al. 2016, algorithm 1).

    Each step draws every example with probability ``sample_rate`` on its own, clips its gradient
    to ``max_grad_norm``, sums, and adds Gaussian noise of standard deviation ``noise_multiplier *
    max_grad_norm``. Neighbouring data sets differ by adding or removing one example.

    Attributes:
        noise_multiplier: at least 0; 0 gives no privacy at all.
        sample_rate: above 0, at most 1.
        steps: how many steps, empty batches included; at least 1.
        max_grad_norm: the clipping norm; above 0.

    Raises:
        BudgetError: if a value is out of its bounds.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    max_grad_norm: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise BudgetError(f"noise_multiplier={self.noise_multiplier} must be at least 0")
        if not 0 < self.sample_rate <= 1:
            raise BudgetError(
                f"sample_rate={self.sample_rate} must be above 0 and at most 1: "
                "a batch cannot be larger than the data"
            )
        if type(self.steps) is not int or self.steps < 1:
            raise BudgetError(f"steps={self.steps!r} must be a whole number of at least 1")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise BudgetError(f"max_grad_norm={self.max_grad_norm} must be above 0")

    def to_mapping(self) -> dict[str, int | float | str]:
        """Plain values, as they travel in ``Update.privacy_event`` and stand in a ledger."""
        return {"kind": KIND, **asdict(self)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SgdEvent:
        """The inverse of :meth:`to_mapping`.

        Raises:
            BudgetError: on a field missing or unknown, or of a wrong type or value.
        """
        names = [field.name for field in fields(cls)]
        if set(values) != {"kind", *names} or values["kind"] != KIND:
            raise BudgetError(
                f"a privacy event has kind={KIND!r} and exactly the fields {', '.join(names)}"
            )
        for name in names:
            if isinstance(values[name], bool) or not isinstance(values[name], int | float):
                raise BudgetError(f"privacy event: {name}={values[name]!r} is not a number")
        return cls(
            noise_multiplier=float(values["noise_multiplier"]),
            sample_rate=float(values["sample_rate"]),
            steps=values["steps"],
            max_grad_norm=float(values["max_grad_norm"]),
        )
