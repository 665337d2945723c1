"""The geometric median: where it is, that liars do not move it, that a gauge plays no part."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.recipes import recipe
from aggregation.robust import GeometricMedian
from aggregation.state import GlobalState, initial_state
from aggregation.update import Update
from tests.aggregation.adapters import (
    FEW,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    update,
)

SEEDS = st.integers(0, 10_000)


def run(name: str, state: GlobalState, updates: list[Update]) -> GlobalState:
    reduction = recipe(name).begin(state)
    for one in updates:
        reduction.add(one)
    return reduction.finish()[0]


def vector(state: GlobalState) -> np.ndarray:
    spec = state.adapter.spec
    parts = [state.exact(m.name).dense().ravel() for m in spec.modules]
    return np.concatenate([*parts, *(state.adapter.tensors[t.key].ravel() for t in spec.others)])


@FEW
@given(st.lists(st.floats(0.1, 5), min_size=3, max_size=7), SEEDS)
def test_no_direction_lessens_the_sum_of_distances(weights: list[float], seed: int) -> None:
    """The definition, in dense vectors: the weighted sum of distances is least."""
    state = initial_state(random_adapter(plain_spec(), seed))
    specs = [plain_spec().with_ranks(1 + k % 6) for k in range(len(weights))]
    starts = [recipe("rfa").hand_out(state, spec) for spec in specs]
    trained = [moved(start, seed + k) for k, start in enumerate(starts)]
    updates = [
        update(f"c{k}", start, t, w)
        for k, (start, t, w) in enumerate(zip(starts, trained, weights, strict=True))
    ]
    found = vector(run("rfa", state, updates)) - vector(state)
    points = []
    for start, after in zip(starts, trained, strict=True):
        parts = [(products(after)[n] - products(start)[n]).ravel() for n in products(start)]
        heads = [after.tensors[t.key] - start.tensors[t.key] for t in start.spec.others]
        points.append(np.concatenate([*parts, *(h.ravel() for h in heads)]))
    share = np.array(weights) / sum(weights)

    def cost(point: np.ndarray) -> float:
        return float(sum(p * np.linalg.norm(x - point) for p, x in zip(share, points, strict=True)))

    size = np.sqrt(np.mean([x @ x for x in points]))
    rng = np.random.default_rng(seed)
    towards = [x - found for x in points] + [rng.standard_normal(len(found)) for _ in range(5)]
    for direction in towards:
        length = np.linalg.norm(direction)
        if length:
            for step in (0.01, 0.1):
                there = cost(found + step * size * direction / length)
                assert there > cost(found) * (1 - 1e-4)


@FEW
@given(SEEDS)
def test_liars_below_half_hardly_count_and_no_gauge_helps_them(seed: int) -> None:
    """Three of ten send the opposite, tenfold; the honest have turned their factors at random."""
    rng = np.random.default_rng(seed)
    spec = plain_spec()
    state = initial_state(random_adapter(spec, seed))
    goal = moved(state.adapter, seed, 0.3)

    def turned(adapter: Adapter) -> Adapter:
        tensors = dict(adapter.tensors)
        for m in spec.modules:
            turn = np.linalg.qr(rng.standard_normal((m.rank, m.rank)))[0]
            key_a, key_b = m.keys
            tensors[key_b], tensors[key_a] = tensors[key_b] @ turn, turn.T @ tensors[key_a]
        return Adapter(spec, tensors)

    honest = [moved(goal, seed + k + 1, 0.02) for k in range(7)]
    opposite = {
        k: 10 * state.adapter.tensors[k] - 10 * (v - state.adapter.tensors[k]) for k, v in goal
    }
    liars = [moved(Adapter(spec, opposite), seed + k, 1e-3) for k in range(3)]
    plain = [update(f"c{k}", state.adapter, t) for k, t in enumerate(honest + liars)]
    other = [update(f"c{k}", state.adapter, turned(t)) for k, t in enumerate(honest + liars)]
    truth = vector(run("svd-warm-start", state, plain[:7]))
    robust, again = vector(run("rfa", state, plain)), vector(run("rfa", state, other))
    assert relative(again, robust) < 1e-5
    assert relative(robust, truth) < 0.1
    assert relative(vector(run("svd-warm-start", state, plain)), truth) > 1.0  # the control


def test_colluders_at_one_point_weigh_little() -> None:
    points = np.random.default_rng(0).standard_normal((7, 400)) * 0.1 + 1.0
    points = np.vstack([points, -10 * np.ones((3, 400))])
    weights = GeometricMedian().weights(points @ points.T, np.full(10, 0.1))
    assert abs(weights.sum() - 1) < 1e-12
    assert weights[:7].min() > 0.1
    assert weights[7:].max() < 0.01


def test_identical_updates_and_no_updates_are_no_division_by_zero() -> None:
    rule = GeometricMedian()
    assert np.allclose(rule.weights(np.zeros((3, 3)), np.full(3, 1 / 3)), 1 / 3)
    assert np.allclose(rule.weights(np.ones((2, 2)), np.array([0.25, 0.75])), [0.25, 0.75])
