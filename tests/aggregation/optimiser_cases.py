"""Rounds for the tests of server optimisers."""

from __future__ import annotations

import numpy as np

from aggregation.adapter import Adapter
from aggregation.distributing import Same
from aggregation.recipe import Recipe
from aggregation.reducing import FactorMean
from aggregation.refactoring import Keep
from aggregation.report import AggregationReport
from aggregation.state import GlobalState
from aggregation.update import Update
from tests.aggregation.adapters import honest

Dense = dict[str, np.ndarray]
MEMORY = ["fedavgm", "fedadam", "fedyogi", "fedadagrad"]


def of_factors(optimise: object, **pieces: object) -> Recipe:
    chosen = {"reduce": FactorMean(), "refactor": Keep(), "distribute": Same()} | pieces
    return Recipe("mine", optimise=optimise, **chosen)


def round_of(
    chosen: Recipe, state: GlobalState, seed: int, clients: int = 3, size: float = 0.1
) -> tuple[GlobalState, AggregationReport, list[Update]]:
    """One round of clients with unequal weights that do what the recipe asks."""
    number = state.round + 1
    updates = [
        Update(
            f"c{k}",
            number,
            state.adapter.digest,
            honest(chosen, state.adapter, 100 * seed + k, size, number),
            1.0 + k,
        )
        for k in range(clients)
    ]
    reduction = chosen.begin(state)
    for one in updates:
        reduction.add(one)
    after, report = reduction.finish()
    return after, report, updates


def mean_change(before: Adapter, updates: list[Update]) -> Dense:
    total = sum(u.weight for u in updates)
    return {
        key: sum(u.weight / total * (u.adapter.tensors[key].astype(float) - old) for u in updates)
        for key, old in before
    }


def idle(chosen: Recipe, state: GlobalState) -> GlobalState:
    reduction = chosen.begin(state)
    for k in range(2):
        digest = state.adapter.digest
        reduction.add(Update(f"c{k}", state.round + 1, digest, state.adapter, 1.0))
    return reduction.finish()[0]
