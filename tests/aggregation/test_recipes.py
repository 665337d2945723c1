"""The algebra that the recipes promise, over random shapes, ranks, scales and weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.core_basis import settle
from aggregation.distributing import Same
from aggregation.errors import RecipeError
from aggregation.init import initial_adapter
from aggregation.low_rank import LowRank
from aggregation.pieces import Uniform
from aggregation.recipe import Recipe
from aggregation.recipes import RECIPES, recipe
from aggregation.reducing import FactorMean
from aggregation.refactoring import Keep, Svd
from aggregation.server_optimizer import Sgd
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState, initial_state
from aggregation.update import Update
from tests.aggregation.adapters import (
    FEW,
    SEEDS,
    WEIGHTS,
    honest,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    run,
    specs,
    update,
)

EXACT = recipe("svd-warm-start")
FEDIT = recipe("fedit")


def started(spec: AdapterSpec, seed: int) -> GlobalState:
    """A state some way into training: adapter and residual are not zero."""
    return GlobalState(
        random_adapter(spec, seed),
        {
            m.name: LowRank.of(random_adapter(spec, seed + 1, 0.1), m.name) * 0.3
            for m in spec.modules
        },
        round=3,
    )


def mixed(spec: AdapterSpec, seed: int, clients: int) -> list[AdapterSpec]:
    """Other ranks and alphas for every client."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(clients):
        ranks = {m.name: int(rng.integers(1, min(m.d_in, m.d_out) + 1)) for m in spec.modules}
        out.append(spec.with_ranks(ranks))
    return out


@FEW
@given(specs(), WEIGHTS, SEEDS)
def test_the_default_is_exact_with_mixed_ranks_and_scales(
    spec: AdapterSpec, weights: list[float], seed: int
) -> None:
    state = started(spec, seed)
    updates = []
    expected = {m.name: state.exact(m.name).dense() for m in spec.modules}
    for k, theirs in enumerate(mixed(spec, seed, len(weights))):
        start = EXACT.hand_out(state, theirs)
        trained = moved(start, seed + k)
        updates.append(update(f"c{k}", start, trained, weights[k]))
        for name, after in products(trained).items():
            change = after - products(start)[name]
            expected[name] = expected[name] + weights[k] / sum(weights) * change
    after, report = run(EXACT, state, updates)
    for name, matrix in expected.items():
        assert relative(after.exact(name).dense(), matrix) < 1e-6
        handed = products(after.adapter)[name]
        values = np.linalg.svd(matrix, compute_uv=False)
        best = np.linalg.norm(values[spec.module(name).rank :])  # Eckart and Young
        assert abs(np.linalg.norm(matrix - handed) - best) < 1e-5 * np.linalg.norm(matrix)
        said = report.modules[name]
        assert said.distance == pytest.approx(best, abs=1e-9 * np.linalg.norm(matrix))
        rows = after.adapter.factors(name)[1].astype(np.float64)
        assert relative(rows @ rows.T, np.eye(len(rows))) < 1e-5
    assert after.round == 4
    assert report.used == len(weights)


@FEW
@given(specs(), WEIGHTS, SEEDS)
def test_fedit_is_the_mean_of_factors_and_misses_by_the_covariance(
    spec: AdapterSpec, weights: list[float], seed: int
) -> None:
    state = initial_state(random_adapter(spec, seed))
    trained = [moved(state.adapter, seed + k) for k in range(len(weights))]
    updates = [update(f"c{k}", state.adapter, t, weights[k]) for k, t in enumerate(trained)]
    after, report = run(FEDIT, state, updates)
    p = np.array(weights) / sum(weights)
    for key, value in after.adapter:
        mean = sum(w * t.tensors[key].astype(np.float64) for w, t in zip(p, trained, strict=True))
        assert relative(value, mean) < 1e-6
    missed_all, exact_all = 0.0, 0.0
    for module in spec.modules:
        exact = sum(w * products(t)[module.name] for w, t in zip(p, trained, strict=True))
        means = after.adapter.factors(module.name)
        covariance = spec.scale(module.name) * sum(
            w * (t.factors(module.name)[0] - means[0]) @ (t.factors(module.name)[1] - means[1])
            for w, t in zip(p, trained, strict=True)
        )
        missed = exact - products(after.adapter)[module.name]
        assert np.linalg.norm(missed - covariance) < 1e-5 * np.linalg.norm(exact)
        error = report.modules[module.name].error
        assert error == pytest.approx(
            np.linalg.norm(missed) / np.linalg.norm(exact), rel=1e-3, abs=1e-6
        )
        missed_all += np.linalg.norm(missed) ** 2
        exact_all += np.linalg.norm(exact) ** 2
    assert report.error == pytest.approx(np.sqrt(missed_all / exact_all), rel=1e-3, abs=1e-6)


# What the others return, their own tests say: robust rules (test_robust.py), optimisers with
# a memory (test_optimisers.py), FLoRA and DP-FedLoRA, which hand out fresh factors, FLoRIST, which
# cuts to 0.9 of the energy (test_further_recipes.py), and FLASC, which adds the change to what it
# did not hand out (test_index_mean.py).
MEANS = [n for n, r in RECIPES.items() if not r.reduce.robust and not r.optimise.stateful]
RETURNING = sorted(set(MEANS) - {"flora", "dp-fedlora", "florist", "flasc"})
# Weights by what a client hands in, or equal ones, do not split.
SPLITTING = sorted(n for n in MEANS if not (RECIPES[n].weigh.measured or RECIPES[n].weigh.equal))


def in_gauge(chosen: Recipe, adapter: Adapter) -> GlobalState:
    """A state that the recipe's clients can have started from."""
    task = chosen.train.assignment(1)
    return initial_state(settle(adapter, task.seed) if task.trains == "core" else adapter)


@pytest.mark.parametrize("name", RETURNING)
@settings(FEW, max_examples=6)
@given(spec=specs(), seed=SEEDS, clients=st.integers(1, 4))
def test_one_client_and_identical_clients_return_their_update(
    spec: AdapterSpec, seed: int, clients: int, name: str
) -> None:
    chosen = recipe(name)
    state = in_gauge(chosen, initial_adapter(spec, seed))
    trained = honest(chosen, state.adapter, seed)
    updates = [update(f"c{k}", state.adapter, trained, 1.0 + k) for k in range(clients)]
    after, report = run(chosen, state, updates)
    for module, matrix in products(trained).items():
        assert relative(products(after.adapter)[module], matrix) < 1e-5
    for tensor in spec.others:
        assert relative(after.adapter.tensors[tensor.key], trained.tensors[tensor.key]) < 1e-6
    assert report.error < 1e-6
    assert report.energy > 1 - 1e-9


@pytest.mark.parametrize("name", sorted(MEANS))
@settings(FEW, max_examples=6)
@given(spec=specs(), seed=SEEDS, random=st.randoms())
def test_order_and_splitting_change_nothing(
    spec: AdapterSpec, seed: int, name: str, random: object
) -> None:
    chosen = recipe(name)
    state = in_gauge(chosen, random_adapter(spec, seed))
    start = chosen.hand_out(state)
    trained = [honest(chosen, start, seed + k) for k in range(4)]
    updates = [update(f"c{k}", start, t, 1.0 + k) for k, t in enumerate(trained)]
    halves = [update(f"c3-{half}", start, trained[3], 2.0) for half in ("left", "right")]
    shuffled = updates[:3] + (halves if name in SPLITTING else updates[3:])
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    once, _ = run(chosen, state, updates)
    again, _ = run(chosen, state, shuffled)
    for module in spec.modules:
        assert (
            relative(products(again.adapter)[module.name], products(once.adapter)[module.name])
            < 1e-5
        )
    for tensor in spec.others:
        assert relative(again.adapter.tensors[tensor.key], once.adapter.tensors[tensor.key]) < 1e-6


def test_two_levels_give_the_same_exact_update_as_one() -> None:
    spec = plain_spec()
    state = started(spec, 5)
    trained = [moved(state.adapter, k) for k in range(5)]
    updates = [update(f"c{k}", state.adapter, t, 1.0 + k) for k, t in enumerate(trained)]
    flat, _ = run(EXACT, state, updates)
    groups = [updates[:2], updates[2:]]
    wide = [run(Recipe("wide"), state, group)[0] for group in groups]
    total = sum(u.weight for u in updates)
    for module in spec.modules:
        share = [sum(u.weight for u in group) / total for group in groups]
        both = sum(p * w.exact(module.name).dense() for p, w in zip(share, wide, strict=True))
        assert relative(both, flat.exact(module.name).dense()) < 1e-6


GAUGE_KEPT = sorted(
    name
    for name in set(SPLITTING) - {"flasc", "lora-fair"}
    if RECIPES[name].reduce.kind == "factor-mean" and not RECIPES[name].refactor.turns
)


@pytest.mark.parametrize("name", GAUGE_KEPT)
@settings(FEW, max_examples=4)
@given(spec=specs(), seed=SEEDS, split=st.integers(1, 4), absent=st.booleans())
def test_two_levels_of_a_mean_of_factors_are_one(
    spec: AdapterSpec, seed: int, split: int, absent: bool, name: str
) -> None:
    """What groups hand up, by their weight, is what all of them give at once."""
    chosen = recipe(name)
    state = in_gauge(chosen, random_adapter(spec, seed))
    start = state.adapter
    updates = [update(f"c{k}", start, honest(chosen, start, seed + k), 1.0 + k) for k in range(5)]
    flat, _ = run(chosen, state, updates)
    upper = []
    for k, group in enumerate((updates[:split], updates[split:])):
        below, _ = run(chosen, state, group)
        upper.append(update(f"g{k}", start, below.adapter, sum(u.weight for u in group)))
    if absent:  # as good as nobody
        upper.append(update("nobody", start, honest(chosen, start, seed + 9), 1e-9))
    both, _ = run(chosen, state, upper)
    for key, value in flat.adapter:
        assert relative(both.adapter.tensors[key], value) < 1e-6


@pytest.mark.parametrize("wiggle", [0.0, 1e-7])
def test_rounds_in_which_nobody_learns_change_nothing(wiggle: float) -> None:
    """Ranks 4/8/16 for ten rounds: the truncation of small clients must not leak into the model."""
    spec = plain_spec((16, 16), width=32)
    state = GlobalState(random_adapter(spec, 1))
    before = products(state.adapter)
    for number in range(10):
        updates = []
        for k, rank in enumerate((4, 4, 4, 4, 8, 8, 8, 8, 16, 16)):
            start = EXACT.hand_out(state, spec.with_ranks(rank))
            trained = start if wiggle == 0 else moved(start, 100 * number + k, wiggle)
            updates.append(Update(f"c{k}", number + 1, start.digest, trained, 1.0))
        state, _ = run(EXACT, state, updates)
    assert state.round == 10
    for name, matrix in before.items():
        assert relative(products(state.adapter)[name], matrix) < (1e-5 if wiggle else 0.0) + 1e-12


@FEW
@given(specs(), SEEDS)
def test_another_gauge_is_the_same_update_for_the_default_but_not_for_fedit(
    spec: AdapterSpec, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    state = initial_state(random_adapter(spec, seed))

    def turned(adapter: Adapter, stretch: float) -> Adapter:
        tensors = dict(adapter.tensors)
        for m in spec.modules:
            turn = np.linalg.qr(rng.standard_normal((m.rank, m.rank)))[0]
            turn = stretch * turn @ np.diag(rng.uniform(0.5, 2, m.rank))
            key_a, key_b = m.keys
            tensors[key_b] = (tensors[key_b] @ turn).astype(np.float32)
            tensors[key_a] = (np.linalg.inv(turn) @ tensors[key_a]).astype(np.float32)
        return Adapter(spec, tensors)

    trained = [moved(state.adapter, seed + k) for k in range(3)]
    plain = [update(f"c{k}", state.adapter, t) for k, t in enumerate(trained)]
    other = [update(f"c{k}", state.adapter, turned(t, 4.0**k)) for k, t in enumerate(trained)]
    one, _ = run(EXACT, state, plain)
    two, _ = run(EXACT, state, other)
    for m in spec.modules:
        assert relative(two.exact(m.name).dense(), one.exact(m.name).dense()) < 1e-5
    control = [run(FEDIT, state, updates)[0] for updates in (plain, other)]
    assert any(
        relative(products(control[1].adapter)[m.name], products(control[0].adapter)[m.name]) > 1e-2
        for m in spec.modules
    )


@FEW
@given(specs(), SEEDS)
def test_what_a_client_loads_times_its_own_scale_is_the_best_of_its_rank(
    spec: AdapterSpec, seed: int
) -> None:
    state = initial_state(random_adapter(spec, seed))
    for theirs in mixed(spec, seed, 3):
        loaded = EXACT.hand_out(state, theirs)
        assert loaded.spec == theirs
        for module in theirs.modules:
            matrix = products(state.adapter)[module.name]
            best = np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[module.rank :])
            missed = np.linalg.norm(matrix - products(loaded)[module.name])
            assert missed <= best + 1e-5 * np.linalg.norm(matrix)
    with pytest.raises(RecipeError, match="Truncate"):
        FEDIT.hand_out(state, spec.with_ranks(1) if spec.modules[0].rank > 1 else mixed_one(spec))


def mixed_one(spec: AdapterSpec) -> AdapterSpec:
    return spec.with_ranks({spec.modules[0].name: spec.modules[0].rank + 1})


def test_a_dead_adapter_cannot_come_out() -> None:
    """All-zero directions keep a living A, orthonormal and the same every time."""
    spec = plain_spec((8, 8))
    state = initial_state(initial_adapter(spec, 0))
    trained = dict(state.adapter.tensors)
    _, key_b = spec.modules[0].keys
    left = np.zeros(spec.shapes()[key_b], np.float32)
    left[:, 0] = 1.0
    trained[key_b] = left  # one live direction in the first module, none in the second
    one = update("c", state.adapter, Adapter(spec, trained))
    after, report = run(EXACT, state, [one])
    assert [m.rank for m in report.modules.values()] == [1, 0]
    for module in spec.modules:
        rows = after.adapter.factors(module.name)[1]
        assert relative(rows @ rows.T, np.eye(8)) < 1e-5
    again, _ = run(EXACT, state, [one])
    assert again.adapter.digest == after.adapter.digest


def test_a_stale_update_counts_exactly_after_the_factors_were_turned() -> None:
    spec = plain_spec()
    first = started(spec, 1)
    late = moved(first.adapter, 50)
    second, _ = run(EXACT, first, [update("early", first.adapter, moved(first.adapter, 2))])
    reduction = EXACT.begin(second, starts={first.adapter.digest: first.adapter})
    reduction.add(update("late", first.adapter, late))
    third, _ = reduction.finish()
    for m in spec.modules:
        change = products(late)[m.name] - products(first.adapter)[m.name]
        expected = second.exact(m.name).dense() + change
        assert relative(third.exact(m.name).dense(), expected) < 1e-6


def test_a_dropped_residual_is_reported_and_a_kept_one_comes_back() -> None:
    spec = plain_spec((2, 2))
    state = initial_state(random_adapter(spec, 0))
    updates = [update(f"c{k}", state.adapter, moved(state.adapter, k)) for k in range(4)]
    kept, with_residual = run(Recipe("kept"), state, updates)
    lossy, without = run(Recipe("lossy", refactor=Svd(residual_rank=0)), state, updates)
    assert with_residual.error == pytest.approx(without.error)
    assert all(m.dropped < 1e-12 for m in with_residual.modules.values())
    assert all(m.dropped == pytest.approx(m.distance) for m in without.modules.values())
    assert kept.adapter.digest == lossy.adapter.digest
    assert all(matrix.rank == 0 for matrix in lossy.residual.values())


def test_many_clients_are_summed_in_one_matrix_and_the_sum_stays_exact() -> None:
    """How much memory that takes is checked in test_running_sums.py."""
    spec = plain_spec((4, 4))
    state = initial_state(random_adapter(spec, 0))
    trained = [moved(state.adapter, k) for k in range(40)]
    updates = [update(f"c{k}", state.adapter, t) for k, t in enumerate(trained)]
    after, _ = run(EXACT, state, updates)
    for m in spec.modules:
        expected = sum(products(t)[m.name] for t in trained) / 40
        assert relative(after.exact(m.name).dense(), expected) < 1e-6


def test_uniform_weights_and_a_server_learning_rate() -> None:
    spec = plain_spec()
    state = initial_state(random_adapter(spec, 0))
    trained = [moved(state.adapter, k) for k in range(2)]
    updates = [update(f"c{k}", state.adapter, t, 1.0 + 9 * k) for k, t in enumerate(trained)]
    half = Recipe("half", weigh=Uniform(), optimise=Sgd(0.5))
    after, _ = run(half, state, updates)
    slow = Recipe(
        "slow", weigh=Uniform(), optimise=Sgd(0.5),
        reduce=FactorMean(), refactor=Keep(), distribute=Same(),
    )  # fmt: skip
    factor, _ = run(slow, state, updates)
    for m in spec.modules:
        before = products(state.adapter)[m.name]
        mean = sum(products(t)[m.name] for t in trained) / 2
        assert relative(after.exact(m.name).dense(), 0.5 * before + 0.5 * mean) < 1e-6
    for key, value in factor.adapter:
        mean = (trained[0].tensors[key] + trained[1].tensors[key]) / 2
        assert relative(value, 0.5 * state.adapter.tensors[key] + 0.5 * mean) < 1e-6


def test_no_update_leaves_the_state_as_it_was() -> None:
    state = started(plain_spec(), 0)
    for chosen in RECIPES.values():
        after, report = chosen.begin(state, trusted="c" if chosen.reduce.trusts else "").finish()
        assert after is state
        assert (report.used, report.error) == (0, 0.0)


def test_measuring_can_be_left_out_where_it_costs_extra() -> None:
    state = started(plain_spec(), 0)
    one = update("c", state.adapter, moved(state.adapter, 1))
    results = []
    for measure in (True, False):
        reduction = FEDIT.begin(state, measure=measure)
        reduction.add(one)
        results.append(reduction.finish())
    assert results[0][0].adapter.digest == results[1][0].adapter.digest
    assert results[0][1].modules
    assert not results[1][1].modules


def test_unsound_recipes_cannot_be_built_and_say_what_could() -> None:
    with pytest.raises(RecipeError, match=r"choose refactor=svd"):
        Recipe("x", refactor=Keep())
    with pytest.raises(RecipeError, match=r"choose distribute=same"):
        Recipe("x", reduce=FactorMean(), refactor=Keep())
    with pytest.raises(RecipeError, match=r"choose refactor=keep"):
        Recipe("x", reduce=FactorMean(), distribute=Same())
    with pytest.raises(RecipeError, match="not one of ByExamples, Uniform"):
        Recipe("x", weigh="examples")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="learning_rate=0"):
        Sgd(0.0)
    with pytest.raises(RecipeError, match="residual_rank=-1"):
        Svd(-1)
    with pytest.raises(RecipeError, match="did you mean 'svd-warm-start'"):
        recipe("svd-warmstart")


def test_recipes_describe_themselves() -> None:
    for name, chosen in RECIPES.items():
        said = chosen.describe()
        assert said["name"] == name == chosen.name
        assert len(said["pieces"]) == 8
        assert str(chosen).count("|") == 7
    assert EXACT.describe()["exact"]
    assert EXACT.describe()["mixed_ranks"]
    assert not FEDIT.describe()["exact"]
    assert FEDIT.describe()["linear"]
