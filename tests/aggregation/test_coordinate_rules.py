"""Rules that decide each coordinate: against their definitions, and what liars get out of them."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.coordinate_rules import Bulyan, CoordinateRule, Median, TrimmedMean
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.state import initial_state
from aggregation.update import Update
from tests.aggregation.adapters import (
    FEW,
    SEEDS,
    moved,
    plain_spec,
    random_adapter,
    relative,
    update,
)
from tests.aggregation.robust_cases import attack, liars_share, only_b, point, run


def chosen(rule: CoordinateRule) -> Recipe:
    return replace(recipe("median"), reduce=rule)


def a_round(seed: int, count: int, spread: float = 0.1) -> list[Update]:
    """Clients that trained B and the head from one start, with weights that must not matter."""
    start = random_adapter(plain_spec((3, 2)), seed)
    rng = np.random.default_rng(seed)
    sizes = spread * rng.uniform(0.5, 2.0, count)
    return [
        update(f"c{k}", start, only_b(start, moved(start, seed + 1 + k, sizes[k])), 1.0 + k)
        for k in range(count)
    ]


def expected(rule: CoordinateRule, column: list[float], liars: int = 0) -> float:
    """One coordinate, as the paper says it."""
    if isinstance(rule, Median):
        return statistics.median(column)
    if isinstance(rule, TrimmedMean):
        cut = int(rule.share * len(column) + 1e-9)
        return statistics.fmean(sorted(column)[cut : len(column) - cut])
    middle = statistics.median(column)
    nearest = sorted(column, key=lambda value: abs(value - middle))
    return statistics.fmean(nearest[: len(column) - 2 * liars])


@FEW
@given(SEEDS, st.integers(3, 9), st.sampled_from([Median(), TrimmedMean(0.35)]))
def test_median_and_trimmed_mean_against_their_definition(
    seed: int, count: int, rule: CoordinateRule
) -> None:
    updates = a_round(seed, count)
    start = random_adapter(plain_spec((3, 2)), seed)
    reduction = chosen(rule).begin(initial_state(start))
    for one in updates:
        reduction.add(one)
    after, _ = reduction.finish()
    for key, value in after.adapter:
        moves = np.array([one.adapter.tensors[key] - start.tensors[key] for one in updates])
        flat = moves.reshape(count, -1).astype(np.float64)
        by_hand = [expected(rule, flat[:, j].tolist()) for j in range(flat.shape[1])]
        assert np.abs((value - start.tensors[key]).ravel() - by_hand).max() < 1e-6


@FEW
@given(SEEDS, st.integers(7, 12))
def test_bulyan_against_its_definition(seed: int, count: int) -> None:
    """Selection by distances of whole products, in dense vectors; then each coordinate."""
    liars = (count - 3) // 4
    updates = a_round(seed, count)
    start = random_adapter(plain_spec((3, 2)), seed)
    points = np.array([point(start, one.adapter) for one in updates])
    left, members = list(range(count)), []
    while len(members) < count - 2 * liars:
        scored = []
        for k in left:
            apart = sorted(float(np.sum((points[k] - points[j]) ** 2)) for j in left)[1:]
            everyone = float(np.sum((points[left] - points[k]) ** 2))
            scored.append((round(sum(apart[: max(1, len(left) - liars - 2)]), 9), everyone, k))
        members.append(min(scored)[2])
        left.remove(members[-1])
    reduction = chosen(Bulyan(liars)).begin(initial_state(start))
    for one in updates:
        reduction.add(one)
    after, report = reduction.finish()
    assert {f"c{k}" for k in members} == {c for c, share in report.influence.items() if share}
    for key, value in after.adapter:
        moves = np.array([updates[k].adapter.tensors[key] - start.tensors[key] for k in members])
        flat = moves.reshape(len(members), -1).astype(np.float64)
        rule = Bulyan(liars)
        by_hand = [expected(rule, flat[:, j].tolist(), liars) for j in range(flat.shape[1])]
        assert np.abs((value - start.tensors[key]).ravel() - by_hand).max() < 1e-6


def test_bulyan_takes_the_lower_of_two_windows_whatever_the_order() -> None:
    values = np.array(
        [[-9, -2, -1, 1, 3, 4], [-4, -3, -1, 1, 2, 9], [-4, -2, -1, 1, 4, 9], [0, 7, 8, 9, 9, 9]],
        np.float64,
    )
    first, width = Bulyan(1).window(values)
    assert (first.tolist(), width) == ([1, 1, 0, 2], 4)


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.3), Bulyan(1)])
def test_liars_cannot_leave_the_range_of_the_honest(rule: CoordinateRule) -> None:
    honest, liars = (6, 1) if isinstance(rule, Bulyan) else (7, 3)
    case = attack(plain_spec(), 5, honest, liars)
    loud = replace(case, liars=[only_b(case.start, moved(one, 9, 5.0)) for one in case.liars])
    reduction = chosen(rule).begin(initial_state(case.start))
    for one in loud.updates(case.honest):
        reduction.add(one)
    after, report = reduction.finish()
    for key, value in after.adapter:
        moves = np.array([one.tensors[key] for one in case.honest])
        assert (value <= moves.max(axis=0) + 1e-5).all()
        assert (value >= moves.min(axis=0) - 1e-5).all()
    assert liars_share(report.influence) < 0.02
    assert abs(sum(report.influence.values()) - 1) < 1e-9


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.3), Bulyan(1)])
@pytest.mark.parametrize("count", [7, 8])
def test_order_and_weights_of_clients_change_nothing(rule: CoordinateRule, count: int) -> None:
    updates = a_round(3, count)
    twin = replace(updates[0], client="twin")
    updates[-1] = twin  # two clients that say the same share what they have
    state = initial_state(random_adapter(plain_spec((3, 2)), 3))
    change, report = run(chosen(rule), state, updates)
    others = [replace(one, weight=7.0 / one.weight) for one in updates[::-1]]
    again, said = run(chosen(rule), state, others)
    assert np.array_equal(change, again)
    for client, share in report.influence.items():
        assert abs(said.influence[client] - share) < 1e-12
    if not isinstance(rule, Bulyan):
        assert report.influence["twin"] == report.influence["c0"] > 0


def test_what_is_handed_out_is_what_the_rule_says() -> None:
    """The report measures it in product space, where all clients start from the same."""
    updates = a_round(1, 7)
    state = initial_state(random_adapter(plain_spec((3, 2)), 1))
    change, report = run(recipe("trimmed-mean"), state, updates)
    assert report.error < 1e-6
    assert report.modules["layer.0.query"].norm > 0
    exact, _ = run(recipe("median"), state, updates)
    assert 0 < relative(change, exact) < 1.0


def test_shares_are_those_of_the_coordinates_that_count() -> None:
    """One client is the median wherever clients differ; where nobody moves, nobody counts."""
    start = random_adapter(plain_spec((3, 2)), 0)
    step = moved(start, 1)
    rows = []
    for k, times in enumerate((-1.0, 0.0, 1.0)):
        tensors = {key: start.tensors[key] + times * (v - start.tensors[key]) for key, v in step}
        rows.append(update(f"c{k}", start, only_b(start, replace(start, tensors=tensors))))
    _, report = run(recipe("median"), initial_state(start), rows)
    assert report.influence == {"c0": 0.0, "c1": 1.0, "c2": 0.0}
