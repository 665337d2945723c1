"""What a server optimiser remembers: over checkpoints, idle rounds and refactorings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.choices import read
from aggregation.errors import RecipeError
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from aggregation.refactoring import Svd
from aggregation.server_adaptive import FedAdagrad, FedAdam, FedYogi
from aggregation.server_optimizer import Momentum
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState, initial_state
from aggregation.train import Alternate, OnlyB
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
from tests.aggregation.optimiser_cases import MEMORY, idle, mean_change, of_factors, round_of


@pytest.mark.parametrize("name", [*MEMORY, "fedsvd-momentum", "product-momentum"])
def test_a_run_that_was_written_down_between_rounds_equals_one_that_was_not(name: str) -> None:
    chosen = {
        "fedsvd-momentum": recipe("fedsvd", {"optimise": "momentum"}),
        "product-momentum": Recipe("p", optimise=Momentum(rank=5)),
    }.get(name) or recipe(name)
    kept = resumed = initial_state(random_adapter(plain_spec(), 0))
    for number in range(4):
        kept, _, _ = round_of(chosen, kept, number)
        resumed, _, _ = round_of(chosen, resumed, number)
        resumed = GlobalState.from_bytes(resumed.to_bytes())
        assert resumed.to_bytes() == kept.to_bytes()
    assert kept.buffers
    forgetful, _, _ = round_of(chosen, GlobalState(kept.adapter, kept.residual, kept.round), 9)
    after, _, _ = round_of(chosen, kept, 9)
    assert forgetful.adapter.digest != after.adapter.digest  # what is remembered matters


@pytest.mark.parametrize("name", MEMORY)
def test_rounds_in_which_nobody_learns_change_nothing_until_something_is_in_motion(
    name: str,
) -> None:
    state = first = initial_state(random_adapter(plain_spec(), 0))
    for _ in range(10):
        state = idle(recipe(name), state)
    assert state.adapter.digest == first.adapter.digest
    assert state.round == 10


def test_momentum_goes_on_when_nobody_learns() -> None:
    for chosen in (of_factors(Momentum(beta=0.5)), Recipe("p", optimise=Momentum(beta=0.5))):
        start = initial_state(random_adapter(plain_spec(), 0))
        one, _, _ = round_of(chosen, start, 1)
        two = idle(chosen, one)
        for tensor in start.adapter.spec.others:
            moves = [s.adapter.tensors[tensor.key].astype(float) for s in (start, one, two)]
            assert relative(moves[2] - moves[1], 0.5 * (moves[1] - moves[0])) < 1e-5
        assert two.adapter.digest != one.adapter.digest


@pytest.mark.parametrize("optimise", [Momentum(), FedAdam(), FedYogi(), FedAdagrad(beta1=0.9)])
def test_a_factor_that_is_frozen_in_a_round_stays_bit_for_bit(optimise: object) -> None:
    chosen = of_factors(optimise, train=Alternate())
    state = initial_state(random_adapter(plain_spec(), 0))
    for number in range(1, 5):
        before = state
        state, _, _ = round_of(chosen, state, number)
        for module in state.adapter.spec.modules:
            key_a, key_b = module.keys
            frozen, moving = (key_a, key_b) if number % 2 else (key_b, key_a)
            assert np.array_equal(state.adapter.tensors[frozen], before.adapter.tensors[frozen])
            assert not np.array_equal(state.adapter.tensors[moving], before.adapter.tensors[moving])
            for name, buffer in before.buffers.items():
                if name.endswith(frozen):
                    assert np.array_equal(state.buffers[name], buffer)


@FEW
@given(specs(), SEEDS, st.sampled_from(["B", "A", "sqrt"]))
def test_momentum_survives_a_refactoring(spec: AdapterSpec, seed: int, balance: str) -> None:
    """Its direction in product space, and a whole run against dense momentum."""
    beta = 0.8
    chosen = of_factors(
        Momentum(beta=beta), train=OnlyB(), refactor=Svd(residual_rank=0, balance=balance)
    )
    state = initial_state(random_adapter(spec, seed))
    velocity = {m.name: np.zeros((m.d_out, m.d_in)) for m in spec.modules}
    total = products(state.adapter)
    for number in range(3):
        before = state
        state, _, updates = round_of(chosen, state, seed + number)
        for m in spec.modules:
            change = sum(
                u.weight / 6 * (products(u.adapter)[m.name] - products(before.adapter)[m.name])
                for u in updates
            )
            velocity[m.name] = beta * velocity[m.name] + change
            total[m.name] = total[m.name] + velocity[m.name]
            assert relative(products(state.adapter)[m.name], total[m.name]) < 1e-5
            motion = state.buffers[f"momentum/{m.keys[1]}"] @ state.adapter.factors(m.name)[1]
            assert cosine(motion, velocity[m.name]) > 0.999
            assert relative(spec.scale(m.name) * motion, velocity[m.name]) < 1e-5


@FEW
@given(specs(), SEEDS)
def test_transported_momenta_of_both_factors_move_the_product_the_same_way(
    spec: AdapterSpec, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    factors, motion = random_adapter(spec, seed), random_adapter(spec, seed + 1)
    buffers = {f"momentum/{key}": value.astype(float) for key, value in motion}
    turns = {m.name: rng.standard_normal((m.rank,) * 2) + 3 * np.eye(m.rank) for m in spec.modules}
    carried = Momentum().transport(spec, buffers, turns)
    for m in spec.modules:
        (left, right), turn = factors.factors(m.name), turns[m.name]
        key_a, key_b = (f"momentum/{key}" for key in m.keys)
        before = buffers[key_b] @ right + left @ buffers[key_a]
        after = carried[key_b] @ np.linalg.solve(turn, right) + left @ turn @ carried[key_a]
        assert relative(after, before) < 1e-6
    for tensor in spec.others:
        assert carried[f"momentum/{tensor.key}"] is buffers[f"momentum/{tensor.key}"]


def test_without_transport_momentum_would_lose_its_direction() -> None:
    """The control of the test above: the gauge does turn."""
    chosen = recipe("fedsvd", {"optimise": "momentum"})
    before = initial_state(random_adapter(plain_spec((4, 4)), 0))
    after, _, updates = round_of(chosen, before, 1)
    for m in before.adapter.spec.modules:
        _, key_b = m.keys
        remembered = mean_change(before.adapter, updates)[key_b]
        _, old = before.adapter.factors(m.name)
        _, new = after.adapter.factors(m.name)
        assert cosine(remembered @ new, remembered @ old) < 0.9
        assert cosine(after.buffers[f"momentum/{key_b}"] @ new, remembered @ old) > 0.999


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))


def test_the_error_in_the_report_is_that_of_the_mean_whatever_the_optimiser_does() -> None:
    state = initial_state(random_adapter(plain_spec(), 0))
    _, plain, _ = round_of(recipe("fedit"), state, 1)
    for name in MEMORY:
        _, said, _ = round_of(recipe(name), state, 1)
        for module, measured in said.modules.items():
            assert measured.distance == pytest.approx(plain.modules[module].distance, rel=1e-6)


@pytest.mark.parametrize("name", MEMORY)
def test_the_state_does_not_depend_on_what_is_measured(name: str) -> None:
    state = initial_state(random_adapter(plain_spec(), 0))
    trained = moved(state.adapter, 1)
    found = []
    for measure in (True, False):
        reduction = recipe(name).begin(state, measure=measure)
        reduction.add(Update("c", 1, state.adapter.digest, trained, 1.0))
        found.append(reduction.finish()[0].to_bytes())
    assert found[0] == found[1]


UNSOUND = {
    "optimise=fedadam": "choose optimise=momentum, or reduce=factor-mean",
    "optimise=fedyogi reduce=factor-mean train=only-b refactor=svd distribute=same": "squares",
    "reduce=factor-mean refactor=svd distribute=same": "train=only-b, whose clients share one A",
    "train=alternate reduce=factor-mean refactor=svd distribute=same": "share one A",
    "train=core reduce=factor-mean refactor=svd distribute=same": "share one A",
    "train=core reduce=product-sum": "choose refactor=keep",
    "train=core reduce=index-mean refactor=keep distribute=cut": "choose distribute=same",
    "train=core optimise=fedadam reduce=factor-mean refactor=keep distribute=same": "of the basis",
    "codec=int8(error_feedback=true)": "choose error_feedback=false",
    "codec=int8(error_feedback=true) train=only-b reduce=factor-mean refactor=svd distribute=same":
        "turns the factors in between",
}  # fmt: skip
SOUND = [
    "optimise=momentum",
    "optimise=momentum refactor=fresh",
    "optimise=momentum refactor=svd-fold",
    "optimise=momentum reduce=factor-mean refactor=mean-residual distribute=same",
    "optimise=momentum train=only-b reduce=factor-mean refactor=svd distribute=same",
    "optimise=momentum train=core reduce=factor-mean refactor=keep distribute=same",
    "optimise=fedadam train=alternate reduce=factor-mean refactor=keep distribute=same",
    "codec=int8(error_feedback=true) reduce=factor-mean refactor=keep distribute=same",
]


def built(text: str) -> Recipe:
    pieces = dict(part.split("=", 1) for part in text.split())
    return Recipe("x", **{piece: read(piece, value) for piece, value in pieces.items()})


@pytest.mark.parametrize("text", UNSOUND)
def test_memory_of_a_gauge_that_turns_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(RecipeError, match="; choose") as raised:
        built(text)
    assert UNSOUND[text] in str(raised.value)


@pytest.mark.parametrize("text", SOUND)
def test_memory_that_is_transported_or_lives_in_products_is_not(text: str) -> None:
    chosen = built(text)
    state = chosen.start(Adapter.zeros(plain_spec()))
    for number in range(2):
        state, _, _ = round_of(chosen, state, number)
    assert state.adapter.is_finite()
