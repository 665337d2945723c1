"""What comes of a secure sum is what comes of the clear updates, for every recipe with one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError, RecipeError
from aggregation.init import initial_adapter
from aggregation.recipe import Recipe
from aggregation.recipes import RECIPES, recipe
from aggregation.ring import RingError
from aggregation.secret import Layout, flat, unflat
from aggregation.secret_reduction import SecureReduction
from aggregation.secret_ring import Ring, SecretError
from aggregation.secure_pieces import ring_of
from aggregation.sketches import first_pass, second_pass
from aggregation.state import GlobalState
from aggregation.update import Update
from tests.aggregation.adapters import FEW, honest, plain_spec, products

SECURE = [name for name, known in RECIPES.items() if known.describe()["secure_sum"]]
SPEC = plain_spec((3, 2), width=12)


def begun(chosen: Recipe) -> GlobalState:
    """A state in which no factor is zero, if the recipe can start from one."""
    start = initial_adapter(SPEC, seed=4)
    if chosen.train.assignment(1).trains != "core":
        start = honest(recipe("fedit"), start, seed=99, size=0.2)
    return chosen.start(start)


def sent(chosen: Recipe, start: Adapter, count: int, seed: int) -> list[Update]:
    """Updates with weights of their own, as their clients would send them in the clear."""
    task, out = chosen.assignment(1, SPEC), []
    for number in range(count):
        trained = honest(chosen, start, seed + number, size=0.05)
        if task.select:  # an index of each module stays, another one for each client
            tensors = dict(trained.tensors)
            for module in SPEC.modules:
                key_a, key_b = module.keys
                idle = number % module.rank
                tensors[key_a], tensors[key_b] = tensors[key_a].copy(), tensors[key_b].copy()
                tensors[key_a][idle] = start.tensors[key_a][idle]
                tensors[key_b][:, idle] = start.tensors[key_b][:, idle]
            trained = Adapter(SPEC, tensors)
        weight = float(1 + (7 * number + seed) % 50)
        made = Update(f"c{number}", 1, start.digest, trained, weight)
        if task.sketch:
            kept = {k: start.tensors[k] for m in SPEC.modules for k in m.keys}
            sketches = first_pass(trained, start, task.sketch, task.seed, 1)
            shown = Adapter(SPEC, {**trained.tensors, **kept})
            made = replace(made, adapter=shown, sketches=sketches)
        out.append(made)
    return out


def in_the_clear(chosen: Recipe, state: GlobalState, updates: list[Update], seed: int) -> Adapter:
    reduction = chosen.begin(state)
    for one in updates:
        reduction.add(one)
    basis = reduction.question()
    for number, one in enumerate(updates):
        if basis:
            trained = honest(chosen, state.adapter, seed + number, size=0.05)
            reduction.answer(one.client, second_pass(trained, state.adapter, basis))
    return reduction.finish()[0].adapter


def as_a_sum(
    chosen: Recipe, state: GlobalState, updates: list[Update], seed: int
) -> tuple[Adapter, float]:
    ring = ring_of(chosen, clients=len(updates) + 2)
    layout = Layout(SPEC, chosen.assignment(1, SPEC), ring)
    start, count = state.adapter, len(updates)
    secrets = [layout.secret(u.adapter, start, u.weight, u.sketches) for u in updates]
    through = [ring.from_bytes(ring.to_bytes(s), layout.length) for s in secrets]
    reduction = chosen.begin(state)
    assert isinstance(reduction, SecureReduction)
    reduction.add_sum(layout.read(np.sum(through, axis=0, dtype=np.uint32), count))
    basis = reduction.question()
    if basis:
        shapes = reduction.answer_shapes()
        total = np.zeros(sum(a * b for a, b in shapes.values()), np.uint32)
        for number, one in enumerate(updates):
            trained = honest(chosen, start, seed + number, size=0.05)
            answer = flat(second_pass(trained, start, basis), shapes)
            total += ring.wide.numbers(answer, 1.0 if ring.equal else one.weight)
        reduction.answer_sum(unflat(ring.wide.sums(total, count), shapes))
    found, report = reduction.finish()
    assert report.used == count
    assert report.influence == {}
    assert report.weight == pytest.approx(sum(u.weight for u in updates), rel=1e-6)
    return found.adapter, reduction.bound


@pytest.mark.parametrize("name", SECURE)
@FEW
@given(count=st.integers(3, 6), seed=st.integers(0, 1000), bits=st.sampled_from([32, 24]))
def test_the_sum_gives_what_the_clear_updates_give(
    name: str, count: int, seed: int, bits: int
) -> None:
    clip = 4.0 if name == "fedask" else 0.5  # rows of a product, times their scale, are longer
    hidden = recipe(name, {"private": f"secure-sum(clip={clip}, max_weight=64, bits={bits})"})
    clear = recipe(name)
    state = begun(clear)
    updates = sent(clear, state.adapter, count, 10 * seed)
    expected = in_the_clear(clear, state, updates, 10 * seed)
    found, bound = as_a_sum(hidden, state, updates, 10 * seed)
    if bits == 32:
        assert bound < 2e-6 * clip
    element_wise = clear.optimise.element_wise
    if clear.reduce.factors and not clear.refactor.turns and not element_wise:
        reach = 60 if clear.reduce.kind == "index-mean" else 1  # divided by a part of the weight
        for key, value in expected:
            step = np.abs(found.tensors[key].astype(float) - value)
            assert float(step.max()) <= reach * bound + 4e-7 * (1 + float(np.abs(value).max()))
    wide = 2e4 if element_wise else 400.0  # products of entries of up to 1, times the scale
    for module, matrix in products(expected).items():
        assert np.abs(products(found)[module] - matrix).max() <= wide * bound + 1e-5


def test_weights_are_right_with_few_bits_too() -> None:
    ring = Ring(clip=1.0, clients=100, max_weight=5000.0, bits=16)
    weights = np.random.default_rng(2).integers(1, 5000, size=(100, 3)).astype(float)
    total = np.sum([ring.weights(w) for w in weights], axis=0, dtype=np.uint32)
    found = ring.weight_sums(total, 100)
    assert np.abs(found - weights.sum(axis=0)).max() <= 100 * 5000 / 2**30
    assert ring.digits == 4


def test_what_would_overflow_is_refused_on_the_client() -> None:
    chosen = recipe("fedit", {"private": "secure-sum(clip=0.1, max_weight=64)"})
    state = begun(chosen)
    layout = Layout(SPEC, chosen.assignment(1, SPEC), ring_of(chosen, 5))
    far = honest(chosen, state.adapter, 1, size=0.5)
    with pytest.raises(RingError, match=r"beyond clip=0\.1"):
        layout.secret(far, state.adapter, 3.0, {})
    near = honest(chosen, state.adapter, 1, size=0.01)
    with pytest.raises(RingError, match="max_weight=64"):
        layout.secret(near, state.adapter, 65.0, {})
    with pytest.raises(RecipeError, match="no level left"):
        ring_of(recipe("fedit", {"private": "secure-sum(bits=16)"}), 40_000)


def test_a_sum_that_nobody_can_have_made_is_void() -> None:
    chosen = recipe("fedit", {"private": "secure-sum"})
    layout = Layout(SPEC, chosen.assignment(1, SPEC), ring_of(chosen, 5))
    noise = np.random.default_rng(0).integers(0, 1 << 32, layout.length, dtype=np.uint32)
    with pytest.raises(RingError, match="void"):
        layout.read(noise, 3)
    with pytest.raises(SecretError, match="no weight"):
        layout.read(np.zeros(layout.length, np.uint32), 3)
    with pytest.raises(SecretError, match="expected"):
        layout.read(noise[1:], 3)


def test_single_updates_and_second_sums_are_refused() -> None:
    chosen = recipe("fedask", {"private": "secure-sum"})
    state = begun(chosen)
    reduction = chosen.begin(state)
    assert isinstance(reduction, SecureReduction)
    updates = sent(chosen, state.adapter, 3, 0)
    with pytest.raises(AggregationError, match="private=none"):
        reduction.add(updates[0])
    with pytest.raises(AggregationError, match="nothing was asked"):
        reduction.answer_sum({})
    layout = Layout(SPEC, chosen.assignment(1, SPEC), ring_of(chosen, 5))
    secrets = [layout.secret(u.adapter, state.adapter, 1.0, u.sketches) for u in updates]
    summed = layout.read(np.sum(secrets, axis=0, dtype=np.uint32), 3)
    reduction.add_sum(summed)
    with pytest.raises(AggregationError, match="already"):
        reduction.add_sum(summed)
    reduction.question()
    with pytest.raises(RecipeError, match="second secure sum"):
        reduction.finish()
    with pytest.raises(SecretError, match="shapes"):
        reduction.answer_sum({"layer.0.query": np.zeros((1, 1))})


@pytest.mark.parametrize(
    ("name", "pieces", "said"),
    [
        ("fedit", {"codec": "int8"}, "codec=float32"),
        ("hetlora", {"weigh": "examples"}, "needs other sums"),
        ("fedit", {"codec": "segments(error_feedback=true)"}, "saves nothing"),
        ("svd-warm-start", {}, "choose reduce=factor-mean"),
        ("krum", {}, "choose private=none"),
    ],
)
def test_what_is_no_such_sum_is_refused_with_a_remedy(
    name: str, pieces: dict[str, str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(name, {**pieces, "private": "secure-sum"})


@pytest.mark.parametrize(
    ("text", "said"), [("dropouts=0.4", "0..1/3"), ("bits=8", "bits=8"), ("clip=0", "clip=0")]
)
def test_settings_out_of_bounds_are_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe("fedit", {"private": f"secure-sum({text})"})


def test_noise_of_a_multiple_of_the_clip_is_one_of_the_norm() -> None:
    """A server must not name noise that a device insists on, and a longer norm beside it."""
    fields = {"equal": True, "noise": 1.0, "least": 6, "honest": 5}
    assert Ring(1.0, 9, norm=1.0, **fields).noise == 1.0  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="norm=1000 is above clip=1"):
        Ring(1.0, 9, norm=1000.0, **fields)  # type: ignore[arg-type]


def test_a_ring_travels_as_plain_values() -> None:
    ring = ring_of(recipe("fed-plora", {"private": "secure-sum"}), 9)
    assert Ring.from_mapping(ring.to_mapping()) == ring
    assert ring.by_index
    assert "noise" not in ring.to_mapping()
    noised = Ring(1.01, 9, equal=True, norm=1.0, noise=0.5, least=6, honest=5)
    assert Ring.from_mapping(noised.to_mapping()) == noised
    with pytest.raises(SecretError, match="fields"):
        Ring.from_mapping({**ring.to_mapping(), "bits": 32.0})
