"""Rounds with liars in them, and dense vectors to judge the robust rules by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.recipe import Recipe
from aggregation.report import AggregationReport
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState
from aggregation.update import Update
from tests.aggregation.adapters import moved, products, update

TRUSTED = "trusted"


def run(
    chosen: Recipe, state: GlobalState, updates: Sequence[Update]
) -> tuple[np.ndarray, AggregationReport]:
    """The change of the global adapter as one vector, and the report."""
    reduction = chosen.begin(state, trusted=TRUSTED if chosen.reduce.trusts else "")
    for one in updates:
        reduction.add(one)
    after, report = reduction.finish()
    return vector(after) - vector(state), report


def vector(state: GlobalState) -> np.ndarray:
    """All that a state says, in dense products and other tensors."""
    spec = state.adapter.spec
    parts = [state.exact(m.name).dense().ravel() for m in spec.modules]
    return np.concatenate([*parts, *(state.adapter.tensors[t.key].ravel() for t in spec.others)])


def point(start: Adapter, trained: Adapter) -> np.ndarray:
    """One client's change, in the same coordinates, by the definition."""
    new, old = products(trained), products(start)
    others = [
        trained.tensors[t.key].astype(np.float64) - start.tensors[t.key] for t in start.spec.others
    ]
    return np.concatenate([*((new[n] - old[n]).ravel() for n in new), *(o.ravel() for o in others)])


def turned(adapter: Adapter, rng: np.random.Generator, condition: float = 10.0) -> Adapter:
    """The same products in another gauge: B R and R^-1 A, R of at most this condition."""
    tensors: dict[str, np.ndarray] = dict(adapter.tensors)
    for m in adapter.spec.modules:
        left, right = (np.linalg.qr(rng.standard_normal((m.rank, m.rank)))[0] for _ in range(2))
        turn = left * np.geomspace(1, condition, m.rank) / np.sqrt(condition) @ right
        key_a, key_b = m.keys
        tensors[key_b] = tensors[key_b].astype(np.float64) @ turn
        tensors[key_a] = np.linalg.inv(turn) @ tensors[key_a].astype(np.float64)
    return Adapter(adapter.spec, tensors)


def flipped(start: Adapter, trained: Adapter, times: float = 1.0) -> Adapter:
    """A trained adapter whose product changes the opposite way (B alone moves back)."""
    tensors = dict(start.tensors)
    for key, value in trained:
        if "lora_A" not in key:
            tensors[key] = start.tensors[key] - times * (value - start.tensors[key])
    return Adapter(start.spec, tensors)


@dataclass(frozen=True, eq=False)
class Attack:
    """Honest clients about one goal, in gauges of their own, and colluders opposite to it.

    Attributes:
        start: what all started from.
        honest: their adapters, in the gauge of the start.
        turned: the same updates in random gauges.
        liars: adapters whose change is the opposite, hardly apart from each other.
        goal: what the server's own clean data would give.
    """

    start: Adapter
    honest: list[Adapter]
    turned: list[Adapter]
    liars: list[Adapter]
    goal: Adapter

    def updates(self, honest: Sequence[Adapter], goal: bool = False) -> list[Update]:
        """One from each client, the liars last, or after them the trusted one."""
        named = {f"honest{k}": one for k, one in enumerate(honest)}
        named |= {f"liar{k}": one for k, one in enumerate(self.liars)}
        if goal:
            named[TRUSTED] = self.goal
        return [update(name, self.start, one) for name, one in named.items()]


def attack(spec: AdapterSpec, seed: int, honest: int = 7, liars: int = 3) -> Attack:
    """Colluders that hardly differ, against honest clients that do; A does not move."""
    rng = np.random.default_rng(seed)
    start = moved(Adapter.zeros(spec), seed, 0.5)
    goal = only_b(start, moved(start, seed + 1, 0.1))
    near = [only_b(start, moved(goal, seed + 10 + k, 0.05)) for k in range(honest)]
    bad = [only_b(start, moved(flipped(start, goal), seed + 50 + k, 1e-5)) for k in range(liars)]
    return Attack(start, near, [turned(one, rng) for one in near], bad, goal)


def only_b(start: Adapter, trained: Adapter) -> Adapter:
    """A trained adapter in which A has stayed where it was."""
    tensors = {k: start.tensors[k] if "lora_A" in k else v for k, v in trained}
    return Adapter(start.spec, tensors)


def liars_share(influence: Mapping[str, float]) -> float:
    """The largest share that a liar has."""
    return max(share for name, share in influence.items() if name.startswith("liar"))
