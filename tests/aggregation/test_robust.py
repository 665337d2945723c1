"""Rules that weigh whole updates: what the papers say, and that neither liars nor gauges help."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.robust import NormClip
from aggregation.robust_rules import Krum, MultiKrum, bulyan_choice, krum_order
from aggregation.spec import AdapterSpec, ModuleSpec
from aggregation.state import GlobalState, initial_state
from aggregation.update import Update, UpdateError, UpdateReason
from tests.aggregation.adapters import (
    BASE,
    FEW,
    SEEDS,
    moved,
    plain_spec,
    random_adapter,
    relative,
    update,
)
from tests.aggregation.robust_cases import TRUSTED, attack, liars_share, point, run, vector

IN_PRODUCT_SPACE = ["krum", "multi-krum", "rfa", "fltrust", "norm-clip"]


def mixed_round(seed: int, ranks: list[int]) -> tuple[GlobalState, list[Update], np.ndarray]:
    """Clients of several ranks, scales and weights; their changes as dense rows."""
    rng = np.random.default_rng(seed)
    state = initial_state(random_adapter(plain_spec(), seed))
    updates, points = [], []
    for k, rank in enumerate(ranks):
        start = recipe("rfa").hand_out(state, plain_spec().with_ranks(rank))
        trained = moved(start, seed + 1 + k, float(rng.uniform(0.05, 0.3)))
        updates.append(update(f"c{k}", start, trained, float(rng.uniform(0.1, 5))))
        points.append(point(start, trained))
    return state, updates, np.array(points)


def scores(points: np.ndarray, liars: int) -> np.ndarray:
    """Krum's, straight from section 4 of the paper."""
    found = []
    for one in points:
        apart = sorted(float(np.sum((one - other) ** 2)) for other in points)
        found.append(sum(apart[1 : len(points) - liars - 1]))
    return np.array(found)


RANKS = st.lists(st.integers(1, 6), min_size=7, max_size=9)


@FEW
@given(SEEDS, RANKS, st.integers(1, 2))
def test_krum_and_multi_krum_against_their_definition(
    seed: int, ranks: list[int], liars: int
) -> None:
    state, updates, points = mixed_round(seed, ranks)
    order = np.argsort(scores(points, liars))
    one, report = run(Recipe("k", reduce=Krum(liars)), state, updates)
    assert relative(one, points[order[0]]) < 1e-5
    assert report.influence == {u.client: float(k == order[0]) for k, u in enumerate(updates)}
    for chosen in (0, 3):
        count = chosen or len(ranks) - liars
        many, _ = run(Recipe("m", reduce=MultiKrum(liars, chosen)), state, updates)
        assert relative(many, points[order[:count]].mean(axis=0)) < 1e-5


@FEW
@given(SEEDS, RANKS)
def test_fltrust_against_its_definition(seed: int, ranks: list[int]) -> None:
    state, updates, points = mixed_round(seed, ranks)
    updates[-1] = replace(updates[-1], client=TRUSTED)
    root, others = points[-1], points[:-1]
    lengths = np.linalg.norm(others, axis=1)
    trust = np.maximum(0.0, others @ root / (lengths * np.linalg.norm(root)))
    expected = sum(
        t * np.linalg.norm(root) / n * x for t, n, x in zip(trust, lengths, others, strict=True)
    )
    found, report = run(recipe("fltrust"), state, updates)
    total = trust.sum() or 1.0  # nobody agrees, nothing moves
    rounding = 1e-6 * np.linalg.norm(vector(state))  # of factors in float32
    goal = np.asarray(expected) / total
    assert np.linalg.norm(found - goal) < 1e-5 * np.linalg.norm(goal) + rounding
    assert report.influence[TRUSTED] == 0.0
    assert np.allclose([report.influence[u.client] for u in updates[:-1]], trust / total)
    assert bool(report.unchanged) == (not trust.any())


def test_a_round_that_counts_nobody_says_so() -> None:
    state, (one, _), _ = mixed_round(3, [2, 2])
    start = recipe("rfa").hand_out(state, one.adapter.spec)

    def stepped(size: float) -> Adapter:
        steps = {name: size * name.endswith("lora_B.weight") for name in start.tensors}
        return Adapter(start.spec, {n: x + np.float32(steps[n]) for n, x in start.tensors.items()})

    updates = [update(c, start, stepped(s), 1.0) for c, s in (("other", -0.1), (TRUSTED, 0.1))]
    after, report = run(recipe("fltrust"), state, updates)
    assert "points the way of the trusted" in report.unchanged
    assert not after.any()  # the change


@FEW
@given(SEEDS, RANKS, st.sampled_from([0.0, 0.5, 2.0, 1e9]))
def test_norm_clip_against_its_definition(seed: int, ranks: list[int], norm: float) -> None:
    """Kept until the end for the median norm, added up as they come for a fixed one."""
    state, updates, points = mixed_round(seed, ranks)
    lengths = np.linalg.norm(points, axis=1)
    limit = norm or np.median(lengths)
    share = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    kept = share * np.minimum(1.0, limit / lengths)
    found, report = run(Recipe("n", reduce=NormClip(norm)), state, updates)
    rounding = 1e-6 * np.linalg.norm(vector(state))  # of factors in float32
    assert np.linalg.norm(found - kept @ points) < 1e-5 * np.linalg.norm(kept @ points) + rounding
    assert np.allclose(list(report.influence.values()), kept, rtol=1e-6)


@FEW
@given(SEEDS, st.lists(st.integers(1, 6), min_size=3, max_size=7))
def test_no_direction_lessens_the_sum_of_distances(seed: int, ranks: list[int]) -> None:
    """The definition of the geometric median."""
    state, updates, points = mixed_round(seed, ranks)
    found, report = run(recipe("rfa"), state, updates)
    share = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    assert relative(np.array(list(report.influence.values())) @ points, found) < 1e-5

    def cost(where: np.ndarray) -> float:
        return float(share @ np.linalg.norm(points - where, axis=1))

    size = np.sqrt(np.mean(np.sum(points**2, axis=1)))
    rng = np.random.default_rng(seed)
    for direction in [*(points - found), *rng.standard_normal((5, len(found)))]:
        length = np.linalg.norm(direction)
        if length:
            for step in (0.01, 0.1):
                there = cost(found + step * size * direction / length)
                assert there > cost(found) * (1 - 1e-4)


def test_colluders_are_not_chosen_whatever_the_gauges() -> None:
    """Three of ten, almost at one point, against honest clients in gauges of their own."""
    spec = plain_spec((4,), width=16)
    fooled = 0
    for seed in range(40):
        case = attack(spec, 1000 * seed)
        state = initial_state(case.start)
        updates = case.updates(case.turned)
        for rule in (Krum(3), MultiKrum(3)):
            _, report = run(Recipe("k", reduce=rule), state, updates)
            assert liars_share(report.influence) == 0.0
        assert liars_share(run(recipe("rfa"), state, updates)[1].influence) < 0.05
        trusting = case.updates(case.turned, goal=True)
        assert liars_share(run(recipe("fltrust"), state, trusting)[1].influence) == 0.0
        factors = np.array([u.adapter.pack() - case.start.pack() for u in updates])
        apart = np.sum((factors[:, None] - factors) ** 2, axis=2)
        fooled += krum_order(apart, 3)[0] >= 7
    assert fooled > 10  # the control: distances of factors


@pytest.mark.parametrize("name", IN_PRODUCT_SPACE)
def test_gauges_and_the_order_of_clients_change_no_decision(name: str) -> None:
    for seed in range(5):
        case = attack(plain_spec(), 1000 * seed, honest=8, liars=2)
        state = initial_state(case.start)
        plain = case.updates(case.honest, goal=name == "fltrust")
        other = case.updates(case.turned, goal=name == "fltrust")
        change, report = run(recipe(name), state, plain)
        for updates in (other, plain[::-1], other[3:] + other[:3]):
            again, said = run(recipe(name), state, updates)
            assert relative(again, change) < 1e-5
            assert said.influence.keys() == report.influence.keys()
            for client, share in report.influence.items():
                assert abs(said.influence[client] - share) < 1e-5


def test_robust_rules_follow_the_honest_and_the_mean_does_not() -> None:
    case = attack(plain_spec(), 3)
    loud = replace(case, liars=[moved(one, 1, 3.0) for one in case.liars])
    state = initial_state(case.start)
    truth = np.mean([point(case.start, one) for one in case.honest], axis=0)
    rules = {"krum(liars=3)": 1.0, "multi-krum(liars=3)": 0.4, "geometric-median": 0.4}
    for rule, far in (rules | {"fltrust": 0.4}).items():
        updates = loud.updates(case.turned, goal=rule == "fltrust")
        chosen = recipe("krum", {"reduce": rule})
        assert relative(run(chosen, state, updates)[0], truth) < far
    mean, _ = run(recipe("svd-warm-start"), state, loud.updates(case.turned))
    clipped, _ = run(recipe("norm-clip"), state, loud.updates(case.turned))
    assert relative(mean, truth) > 3.0
    assert relative(clipped, truth) < 0.4 * relative(mean, truth)


@pytest.mark.parametrize("name", [*IN_PRODUCT_SPACE, "bulyan", "trimmed-mean", "median"])
def test_identical_clients_return_their_update(name: str) -> None:
    case = attack(plain_spec(), 0)
    state = initial_state(case.start)
    names = [f"c{k}" for k in range(7)] + [TRUSTED] * (name == "fltrust")
    change, _ = run(recipe(name), state, [update(c, case.start, case.goal) for c in names])
    assert relative(change, point(case.start, case.goal)) < 1e-5


@pytest.mark.parametrize("name", [*IN_PRODUCT_SPACE, "bulyan", "trimmed-mean", "median"])
def test_nobody_learns_and_nothing_moves(name: str) -> None:
    start = random_adapter(plain_spec(), 0)
    names = [f"c{k}" for k in range(7)] + [TRUSTED] * (name == "fltrust")
    change, _ = run(recipe(name), initial_state(start), [update(c, start, start) for c in names])
    assert not change.any()


def test_identical_updates_do_not_vanish() -> None:
    case = attack(plain_spec(), 0, honest=5, liars=1)
    twins = [*case.honest[:4], case.honest[3]]
    state = initial_state(case.start)
    change, report = run(Recipe("m", reduce=MultiKrum(1)), state, case.updates(twins))
    expected = np.mean([point(case.start, one) for one in twins], axis=0)
    assert relative(change, expected) < 1e-5
    assert all(abs(report.influence[f"honest{k}"] - 0.2) < 1e-12 for k in range(5))
    one, *others = case.honest
    found, report = run(recipe("rfa"), state, case.updates([one, one, one, *others[:1]]))
    assert list(report.influence.values()) == pytest.approx([1 / 3] * 3 + [0, 0], abs=1e-12)
    assert relative(found, point(case.start, one)) < 1e-5  # most are there, so the median is


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("loud", [1.0, 1e3, 1e6])
def test_liars_of_any_size_move_the_geometric_median_by_less_than_the_honest_differ(
    size: float, loud: float
) -> None:
    """As large as values may be: neither the smoothing, nor rounding, nor the end is theirs."""
    start = initial_adapter(AdapterSpec(BASE, (ModuleSpec("query", 30, 20, 4, 16.0),)), seed=1)
    goal = moved(start, 1, size)
    honest = [moved(goal, 10 + k, size) for k in range(7)]
    rng = np.random.default_rng(0)
    far = {k: loud * rng.uniform(-1, 1, value.shape) for k, value in start}
    updates = [update(f"c{k}", start, one) for k, one in enumerate(honest)]
    for k in range(3):
        liar = {key: (value * (1 - 1e-6 * k)).astype(np.float32) for key, value in far.items()}
        updates.append(update(f"liar{k}", start, Adapter(start.spec, liar)))
    points = np.array([point(start, one) for one in honest])
    spread = np.linalg.norm(points - points.mean(axis=0), axis=1).mean()
    found, report = run(recipe("rfa"), initial_state(start), updates)
    assert np.linalg.norm(found - points.mean(axis=0)) < spread
    assert liars_share(report.influence) < 0.1


def test_a_client_of_rank_1_beside_rank_8_is_itself() -> None:
    state = initial_state(random_adapter(plain_spec((8, 8)), 0))
    updates, points = [], []
    for k, rank in enumerate([8, 8, 1, 8, 8]):
        start = recipe("krum").hand_out(state, plain_spec((rank, rank)))
        trained = moved(start, 0 if rank == 1 else 10 + k, 0.01 if rank == 1 else 0.3)
        updates.append(update(f"c{k}", start, trained))
        points.append(point(start, trained))
    change, report = run(recipe("krum"), state, updates)
    assert report.influence["c2"] == 1.0
    assert relative(change, points[2]) < 1e-4
    reduction = recipe("median").begin(state)
    with pytest.raises(UpdateError) as refused:
        reduction.add(updates[2])
    assert refused.value.reason in (UpdateReason.WRONG_SHAPE, UpdateReason.UNKNOWN_START)


def test_if_nobody_agrees_with_the_trusted_client_nothing_moves() -> None:
    case = attack(plain_spec(), 0)
    updates = [update(f"liar{k}", case.start, one) for k, one in enumerate(case.liars)]
    updates.append(update(TRUSTED, case.start, case.goal))
    change, report = run(recipe("fltrust"), initial_state(case.start), updates)
    assert not change.any()
    assert set(report.influence.values()) == {0.0}


def test_bulyan_chooses_again_after_each_choice() -> None:
    """Once its neighbour is taken, the second best of the first round is no longer near anybody."""
    rng = np.random.default_rng(0)
    differ = 0
    for _ in range(50):
        points = rng.standard_normal((11, 3)) * rng.choice([0.1, 3.0], 11)[:, None]
        apart = np.sum((points[:, None] - points) ** 2, axis=2)
        left, expected = list(range(11)), []
        while len(expected) < 7:
            best = left[int(np.argmin(_open_scores(points[left], 2)))]
            expected.append(best)
            left.remove(best)
        assert bulyan_choice(apart, 2) == expected
        differ += set(expected) != set(np.argsort(_open_scores(points, 2))[:7].tolist())
    assert differ > 10


def _open_scores(points: np.ndarray, liars: int) -> list[float]:
    """Krum's scores of few points, of which one neighbour at least counts; ties by all of them."""
    found = []
    for one in points:
        apart = np.sort(np.sum((points - one) ** 2, axis=1))[1:]
        near = max(1, len(points) - liars - 2)
        found.append(float(apart[:near].sum() + 1e-9 * apart.sum()))
    return found


def test_identical_and_absent_distances_are_no_division_by_zero() -> None:
    case = attack(plain_spec(), 0)
    state = initial_state(case.start)
    alone, _ = run(recipe("norm-clip"), state, [update("c", case.start, case.goal)])
    assert relative(alone, point(case.start, case.goal)) < 1e-5
    assert np.isfinite(vector(state)).all()
