"""Where the noise of a test comes from: nobody counts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from aggregation.low_rank import Array


@dataclass
class FreeNoise:
    """Standard normals of NumPy, times a factor; remembers what would have been paid for."""

    factor: float = 1.0
    seed: int = 0
    paid: list[tuple[int, str]] = field(default_factory=list)

    def pay(self, number: int, inputs: str) -> Callable[[str, int], Array]:
        self.paid.append((number, inputs))

        def normals(name: str, count: int) -> Array:
            label = [self.seed, number, int(inputs[:12], 16), *name.encode()]
            return self.factor * np.random.default_rng(label).standard_normal(count)

        return normals
