"""Rotations on the client's side: what they keep, and what they gain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.aligning import AlignError, align, rotation
from aggregation.init import initial_adapter
from aggregation.recipes import recipe
from aggregation.spec import AdapterSpec
from aggregation.state import initial_state
from tests.aggregation.adapters import (
    FEW,
    SEEDS,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    specs,
    update,
)

FACTOR = st.sampled_from(["A", "B"])


def turned(adapter: Adapter, seed: int) -> Adapter:
    """The same products in factors of a random rotation."""
    rng = np.random.default_rng(seed)
    tensors = dict(adapter.tensors)
    for m in adapter.spec.modules:
        turn = np.linalg.qr(rng.standard_normal((m.rank, m.rank)))[0]
        if np.linalg.det(turn) < 0:
            turn[:, 0] *= -1
        left, right = (x.astype(float) for x in adapter.factors(m.name))
        key_a, key_b = m.keys
        tensors[key_a], tensors[key_b] = turn.T @ right, left @ turn
    return Adapter(adapter.spec, tensors)


@FEW
@given(specs(), SEEDS, FACTOR, st.floats(0.01, 1.0))
def test_the_update_stays_the_same(
    spec: AdapterSpec, seed: int, towards: str, softness: float
) -> None:
    start, trained = random_adapter(spec, seed), random_adapter(spec, seed + 1)
    ready = align(trained, start, towards, softness)
    for name, matrix in products(trained).items():
        assert relative(products(ready)[name], matrix) < 1e-6
    for tensor in spec.others:
        assert np.array_equal(ready.tensors[tensor.key], trained.tensors[tensor.key])
    for m in spec.modules:  # and it never gets further away
        which = 1 if towards == "A" else 0
        distances = [
            np.linalg.norm(x.factors(m.name)[which] - start.factors(m.name)[which])
            for x in (trained, ready, align(trained, start, towards, 1.0))
        ]
        assert distances[2] <= distances[1] + 1e-5
        assert distances[2] <= distances[0] + 1e-5


@FEW
@given(specs(), SEEDS, FACTOR)
def test_a_hard_rotation_brings_a_rotated_copy_back(
    spec: AdapterSpec, seed: int, towards: str
) -> None:
    start = random_adapter(spec, seed)
    back = align(turned(start, seed + 1), start, towards, 1.0)
    for key, value in start:
        assert relative(back.tensors[key], value) < 1e-5


@FEW
@given(specs(), SEEDS)
def test_no_softness_is_no_turn_and_a_factor_without_direction_turns_nothing(
    spec: AdapterSpec, seed: int
) -> None:
    start, trained = initial_adapter(spec, seed), random_adapter(spec, seed)
    assert align(trained, start, "A", 0.0) is trained
    assert align(trained, start, "B", 1.0).digest == trained.digest  # B = 0 in the first round
    assert align(start, start, "A", 0.7).pack() == pytest.approx(start.pack(), abs=1e-6)


@FEW
@given(st.integers(1, 6), SEEDS, st.floats(0.0, 1.0))
def test_every_turn_is_a_proper_rotation(rank: int, seed: int, softness: float) -> None:
    overlap = np.random.default_rng(seed).standard_normal((rank, rank))
    turn = rotation(overlap, softness)
    assert relative(turn @ turn.T, np.eye(rank)) < 1e-12
    assert np.linalg.det(turn) == pytest.approx(1.0)
    if softness == 1:  # the best of them: no small turn of it comes closer
        for _ in range(20):
            small = np.random.default_rng(seed).standard_normal((rank, rank)) * 1e-3
            nudge = np.linalg.qr(np.eye(rank) + small - small.T)[0]
            nudge *= np.sign(np.diag(nudge))
            assert np.trace(turn @ nudge @ overlap) <= np.trace(turn @ overlap) + 1e-12


def test_where_the_reference_says_nothing_nothing_turns() -> None:
    """A reference of lower rank decides its own directions only."""
    overlap = np.zeros((4, 4))
    overlap[:2, :2] = [[0.0, 2.0], [-1.0, 0.0]]
    turn = rotation(overlap, 1.0)
    assert turn[2:, 2:] == pytest.approx(np.eye(2), abs=1e-6)


@FEW
@given(specs(), SEEDS)
def test_with_hard_rotation_the_mean_does_not_depend_on_the_client_s_rotation(
    spec: AdapterSpec, seed: int
) -> None:
    """FedIT's does: that is what the alignment is for."""
    state = initial_state(random_adapter(spec, seed))
    trained = [moved(state.adapter, seed + k) for k in range(3)]
    free = [turned(one, seed + k) for k, one in enumerate(trained)]

    def mean(adapters: list[Adapter], aligned: bool) -> dict[str, np.ndarray]:
        reduction = recipe("fedrot-lora").begin(state)
        for k, one in enumerate(adapters):
            ready = align(one, state.adapter, "A", 1.0) if aligned else one
            reduction.add(update(f"c{k}", state.adapter, ready, 1.0 + k))
        return products(reduction.finish()[0].adapter)

    for name, matrix in mean(trained, aligned=True).items():
        assert relative(mean(free, aligned=True)[name], matrix) < 1e-5
    if all(m.rank > 1 for m in spec.modules):
        plain, other = mean(trained, aligned=False), mean(free, aligned=False)
        assert any(relative(other[name], plain[name]) > 1e-3 for name in plain)


def test_alignment_lowers_the_error_of_the_mean() -> None:
    state = initial_state(random_adapter(plain_spec((8, 8)), 0))
    trained = [turned(moved(state.adapter, k), k) for k in range(6)]
    errors = []
    for softness in (0.0, 0.5, 1.0):
        reduction = recipe("fedrot-lora").begin(state)
        for k, one in enumerate(trained):
            ready = align(one, state.adapter, "A", softness)
            reduction.add(update(f"c{k}", state.adapter, ready))
        errors.append(reduction.finish()[1].error)
    assert errors[2] < 0.3 * errors[0]
    assert errors[2] < errors[1] < errors[0]


def test_what_cannot_be_aligned_is_refused() -> None:
    adapter = random_adapter(plain_spec(), 0)
    with pytest.raises(AlignError, match="other specifications"):
        align(adapter, random_adapter(plain_spec((2, 2)), 0), "A")
    with pytest.raises(AlignError, match="towards='C'"):
        align(adapter, adapter, "C")
    for softness in (-0.1, 1.1, float("nan")):
        with pytest.raises(AlignError, match="softness="):
            align(adapter, adapter, "A", softness)
