"""Server optimisers against their papers' formulas, written down here a second time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.choices import read
from aggregation.errors import RecipeError
from aggregation.low_rank import LowRank
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.server_adaptive import FedAdagrad, FedAdam, FedYogi
from aggregation.server_optimizer import Momentum, Sgd
from aggregation.spec import AdapterSpec
from aggregation.state import initial_state
from aggregation.update import Update
from tests.aggregation.adapters import (
    FEW,
    SEEDS,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    specs,
)
from tests.aggregation.optimiser_cases import Dense, mean_change, of_factors, round_of


def adam(m: np.ndarray, v: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 0.8 * m + 0.2 * d, 0.95 * v + 0.05 * d * d


def yogi(m: np.ndarray, v: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 0.8 * m + 0.2 * d, np.where(v > d * d, v - 0.05 * d * d, v + 0.05 * d * d)


def adagrad(m: np.ndarray, v: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 0.8 * m + 0.2 * d, v + d * d


RATES = {"learning_rate": 0.03, "head_learning_rate": 0.2, "beta1": 0.8, "tau": 0.05}
PAPER: list[tuple[object, Callable[..., tuple[np.ndarray, np.ndarray]]]] = [
    (FedAdam(beta2=0.95, **RATES), adam),  # type: ignore[arg-type]
    (FedYogi(beta2=0.95, **RATES), yogi),  # type: ignore[arg-type]
    (FedAdagrad(**RATES), adagrad),
]


@pytest.mark.parametrize(("optimise", "formula"), PAPER, ids=["adam", "yogi", "adagrad"])
@FEW
@given(spec=specs(), seed=SEEDS)
def test_three_rounds_follow_the_paper_s_formula(
    spec: AdapterSpec, seed: int, optimise: object, formula: Callable[..., tuple[np.ndarray, ...]]
) -> None:
    chosen = of_factors(optimise)
    state = initial_state(random_adapter(spec, seed))
    heads = {tensor.key for tensor in spec.others}
    m = {key: np.zeros_like(value, dtype=float) for key, value in state.adapter}
    v = {key: np.full(value.shape, 0.05**2) for key, value in state.adapter}  # tau^2
    for number in range(3):
        before = state.adapter
        state, _, updates = round_of(chosen, state, seed + number)
        for key, change in mean_change(before, updates).items():
            m[key], v[key] = formula(m[key], v[key], change)
            rate = 0.2 if key in heads else 0.03
            expected = before.tensors[key] + rate * m[key] / (np.sqrt(v[key]) + 0.05)
            assert relative(state.adapter.tensors[key], expected) < 1e-6


@FEW
@given(specs(), SEEDS)
def test_with_bias_correction_adam_is_kingma_and_ba_s(spec: AdapterSpec, seed: int) -> None:
    chosen = of_factors(FedAdam(learning_rate=0.03, head_learning_rate=0.03, bias_correction=True))
    state = initial_state(random_adapter(spec, seed))
    m = {key: np.zeros_like(value, dtype=float) for key, value in state.adapter}
    v = {key: np.zeros_like(value, dtype=float) for key, value in state.adapter}
    for t in (1, 2):
        before = state.adapter
        state, _, updates = round_of(chosen, state, seed + t)
        for key, change in mean_change(before, updates).items():
            m[key] = 0.9 * m[key] + 0.1 * change
            v[key] = 0.99 * v[key] + 0.01 * change**2
            fair = m[key] / (1 - 0.9**t), v[key] / (1 - 0.99**t)
            expected = before.tensors[key] + 0.03 * fair[0] / (np.sqrt(fair[1]) + 0.001)
            assert relative(state.adapter.tensors[key], expected) < 1e-6


@FEW
@given(specs(), SEEDS, st.sampled_from([0.0, 0.5, 0.9]))
def test_momentum_of_factors_is_the_unrolled_sum(spec: AdapterSpec, seed: int, beta: float) -> None:
    chosen = of_factors(Momentum(beta=beta, learning_rate=0.7))
    state = initial_state(random_adapter(spec, seed))
    changes: list[Dense] = []
    for number in range(4):
        before = state.adapter
        state, _, updates = round_of(chosen, state, seed + number)
        changes.append(mean_change(before, updates))
        for key, old in before:
            step = sum(beta ** (number - j) * changes[j][key] for j in range(number + 1))
            assert relative(state.adapter.tensors[key], old + 0.7 * step) < 1e-6


@FEW
@given(specs(), SEEDS, st.sampled_from([0.5, 0.9]))
def test_momentum_in_product_space_is_a_dense_momentum(
    spec: AdapterSpec, seed: int, beta: float
) -> None:
    """With mixed ranks, through an SVD in every round, and with a head beside."""
    chosen = Recipe("mine", optimise=Momentum(beta=beta, learning_rate=0.7))
    state = initial_state(random_adapter(spec, seed))
    velocity = {m.name: np.zeros((m.d_out, m.d_in)) for m in spec.modules}
    total = {m.name: state.exact(m.name).dense() for m in spec.modules}
    heads = {t.key: np.zeros(t.shape) for t in spec.others}
    for number in range(3):
        before = state.adapter
        reduction = chosen.begin(state)
        change = {name: np.zeros_like(matrix) for name, matrix in velocity.items()}
        head = {key: np.zeros_like(value) for key, value in heads.items()}
        for k, theirs in enumerate((spec, spec.with_ranks(1))):
            start = chosen.hand_out(state, theirs)
            trained = moved(start, seed + 10 * number + k)
            reduction.add(Update(f"c{k}", number + 1, start.digest, trained, 1.0 + k))
            share = (1.0 + k) / 3.0
            for name in change:
                change[name] += share * (products(trained)[name] - products(start)[name])
            for key in head:
                head[key] += share * (trained.tensors[key].astype(float) - start.tensors[key])
        state, report = reduction.finish()
        for name in velocity:
            velocity[name] = beta * velocity[name] + change[name]
            total[name] = total[name] + 0.7 * velocity[name]
            assert relative(state.exact(name).dense(), total[name]) < 1e-6
            remembered = LowRank(
                state.buffers[f"momentum/{name}/B"], state.buffers[f"momentum/{name}/A"]
            )
            assert relative(remembered.dense(), velocity[name]) < 1e-6
        for key in heads:
            heads[key] = beta * heads[key] + head[key]
            expected = before.tensors[key] + 0.7 * heads[key]
            assert relative(state.adapter.tensors[key], expected) < 1e-6
        assert report.modules


def test_what_momentum_remembers_of_products_is_the_best_of_its_rank() -> None:
    spec = plain_spec((4, 4), width=40)
    state = initial_state(random_adapter(spec, 0))
    full, _, updates = round_of(Recipe("full", optimise=Momentum()), state, 1)
    cut, _, _ = round_of(Recipe("cut", optimise=Momentum(rank=3)), state, 1)
    for m in spec.modules:
        change = sum(
            u.weight / 6 * (products(u.adapter)[m.name] - products(state.adapter)[m.name])
            for u in updates
        )
        kept = LowRank(cut.buffers[f"momentum/{m.name}/B"], cut.buffers[f"momentum/{m.name}/A"])
        assert kept.rank == 3
        best = np.linalg.norm(np.linalg.svd(change, compute_uv=False)[3:])
        assert np.linalg.norm(change - kept.dense()) == pytest.approx(best, rel=1e-6)
        # the change of the round itself is applied in full
        assert relative(cut.exact(m.name).dense(), full.exact(m.name).dense()) < 1e-12


def test_default_rates_suit_the_changes_of_lora() -> None:
    """Changes of 1e-4 to 1e-3 (facts): steps are of their size, and never beyond the rate."""
    spec = plain_spec()
    for size in (1e-4, 1e-3):
        for name in ("fedadam", "fedyogi", "fedadagrad"):
            state = initial_state(random_adapter(spec, 0))
            for number in range(20):
                before, after = state, round_of(recipe(name), state, number, 1, size)
                state = after[0]
            for module in spec.modules:
                key = module.keys[1]
                step = np.abs(state.adapter.tensors[key] - before.adapter.tensors[key])
                assert 0.02 * size < np.sqrt(np.mean(step**2)) < 2 * size
                assert step.max() < 0.002 + 1e-6


def test_settings_out_of_range_are_refused_by_name() -> None:
    for make, what in (
        (lambda: Sgd(float("nan")), "learning_rate=nan"),
        (lambda: Sgd(1e300), "at most 1e.06"),
        (lambda: Momentum(learning_rate=-1.0), "learning_rate=-1"),
        (lambda: Momentum(beta=1.0), "beta=1"),
        (lambda: Momentum(rank=0), "rank=0"),
        (lambda: FedAdam(tau=0.0), "tau=0"),
        (lambda: FedAdam(beta2=1.0), "beta2=1"),
        (lambda: FedYogi(head_learning_rate=0.0), "learning_rate=0"),
        (lambda: FedAdagrad(beta1=-0.1), "beta1=-0.1"),
    ):
        with pytest.raises(RecipeError, match=what):
            make()
    with pytest.raises(RecipeError, match="rate for every entry"):
        FedAdam().transport(plain_spec(), {}, {"layer.0.query": np.eye(4)})


def test_optimisers_print_themselves_and_are_read_back() -> None:
    for optimise in (Momentum(0.5, 0.1, 8), FedAdam(bias_correction=True), FedYogi(tau=0.01)):
        assert read("optimise", str(optimise)) == optimise
