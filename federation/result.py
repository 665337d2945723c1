"""What a training run is asked to measure, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aggregation.adapter import Adapter
from aggregation.state import GlobalState
from federation.rounds import Round

Evaluate = Callable[[Adapter, tuple[Adapter, ...]], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        adapter: the global adapter.
        state: adapter and residual, to go on from.
        rounds: the record of every round, the measurement before the first included.
        beside: frozen adapters that belong to the global one; none for most recipes.
    """

    adapter: Adapter
    state: GlobalState
    rounds: tuple[Round, ...]
    beside: tuple[Adapter, ...] = ()
