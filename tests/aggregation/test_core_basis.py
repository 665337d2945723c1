"""The public basis of Fed-SB: the same on every machine, and exact."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.core_basis import CoreError, basis, core_of, enter, settle, with_core
from aggregation.init import initial_adapter
from aggregation.recipes import recipe
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from aggregation.state import initial_state
from aggregation.update import Update, UpdateError
from tests.aggregation.adapters import (
    BASE,
    FEW,
    honest,
    plain_spec,
    products,
    random_adapter,
    relative,
    specs,
)

SEEDS = st.integers(0, 1 << 62)
WIDE = AdapterSpec(
    BASE, (ModuleSpec("deep.query", 384, 1000, 64, 16.0),), (TensorSpec("head.weight", (3, 5)),)
)


def digest(spec: AdapterSpec, seed: int) -> str:
    parts = [part for pair in basis(spec, seed).values() for part in pair]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@FEW
@given(specs(max_rank=12), SEEDS)
def test_the_basis_is_orthonormal_and_smaller_ranks_have_a_part_of_it(
    spec: AdapterSpec, seed: int
) -> None:
    for name, (left, right) in basis(spec, seed).items():
        rank = spec.module(name).rank
        assert relative(left.T @ left, np.eye(rank)) < 1e-13
        assert relative(right @ right.T, np.eye(rank)) < 1e-13
        for less in range(1, rank + 1):
            small_left, small_right = basis(spec.with_ranks({name: less}), seed)[name]
            assert np.array_equal(small_left, left[:, :less])
            assert np.array_equal(small_right, right[:less])


def test_the_basis_is_the_same_bits_everywhere_and_for_ever() -> None:
    """Pinned: a client of another version or machine must make the same one."""
    pinned = "bd14588d08315d9f74d68b1d6a3b9046faf77de6ca93133506164bb6484c9cfe"
    assert digest(WIDE, 7) == pinned
    code = "from tests.aggregation.test_core_basis import WIDE, digest\nprint(digest(WIDE, 7))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == pinned


def test_modules_sides_and_seeds_have_bases_of_their_own() -> None:
    spec = plain_spec((4, 4), width=24)
    seen = [part for seed in (1, 2) for pair in basis(spec, seed).values() for part in pair]
    frames = [part if part.shape[0] == 4 else part.T for part in seen]
    frames = [frame for frame in frames if frame.shape == (4, 24)]
    assert len(frames) > 4
    for index, frame in enumerate(frames):
        for other in frames[:index]:
            assert np.linalg.norm(frame @ other.T, 2) < 0.99


@FEW
@given(specs(), SEEDS, st.floats(1e-6, 1e3))
def test_cores_go_round_exactly(spec: AdapterSpec, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed % 1000)
    cores = {m.name: size * rng.standard_normal((m.rank, m.rank)) for m in spec.modules}
    head = {t.key: random_adapter(spec, 1).tensors[t.key] for t in spec.others}
    adapter = with_core(spec, cores, seed, head)
    found = core_of(adapter, seed)
    for m in spec.modules:
        largest = np.abs(cores[m.name]).max()
        assert np.abs(found[m.name] - cores[m.name]).max() < 3e-7 * largest
        left, right = basis(spec, seed)[m.name]
        dense = spec.scale(m.name) * left @ cores[m.name] @ right
        assert relative(products(adapter)[m.name], dense) < 1e-6
    again = with_core(spec, found, seed, head)
    once_more = core_of(again, seed)
    for name, core in found.items():
        assert core.dtype == np.float32
        assert core.tobytes() == once_more[name].tobytes()
    assert settle(again, seed).digest == again.digest == settle(adapter, seed).digest


def test_cores_go_round_exactly_at_the_size_of_a_model() -> None:
    """Also where the core is as large as B, and B has no digits to spare."""
    square = AdapterSpec(BASE, (ModuleSpec("deep.query", 384, 64, 64, 16.0),))
    for spec in (WIDE, square):
        for seed in range(10):
            rng = np.random.default_rng(seed)
            draw = rng.standard_t(2, (64, 64)) if seed % 2 else rng.standard_normal((64, 64))
            cores = core_of(with_core(spec, {"deep.query": draw}, seed), seed)
            again = core_of(with_core(spec, cores, seed), seed)
            assert cores["deep.query"].tobytes() == again["deep.query"].tobytes()


@FEW
@given(specs(), st.lists(st.floats(0.1, 50), min_size=1, max_size=5), st.integers(0, 10_000))
def test_the_mean_of_the_cores_is_the_core_of_the_mean(
    spec: AdapterSpec, weights: list[float], seed: int
) -> None:
    """Fed-SB is exact over rounds; what is handed out lies in the basis, bit for bit."""
    chosen = recipe("fed-sb")
    state = chosen.start(initial_adapter(spec, seed))
    expected = products(state.adapter)
    size = {name: np.linalg.norm(product) for name, product in expected.items()}
    for number in range(1, 4):
        start, share = state.adapter, np.array(weights) / sum(weights)
        reduction = chosen.begin(state)
        for k, weight in enumerate(weights):
            trained = honest(chosen, start, seed + 10 * number + k)
            reduction.add(Update(f"c{k}", number, start.digest, trained, weight))
            for name, after in products(trained).items():
                change = share[k] * (after - products(start)[name])
                expected[name] = expected[name] + change
                size[name] += np.linalg.norm(change)
        state, _ = reduction.finish()
        assert settle(state.adapter, 0).digest == state.adapter.digest
        for m in spec.modules:
            found = products(state.adapter)[m.name]
            # Changes may cancel: float32 rounds by what was added, not by what is left.
            assert np.linalg.norm(found - expected[m.name]) < 1e-5 * size[m.name]
            assert np.linalg.matrix_rank(found, tol=1e-4 * np.linalg.norm(found)) <= m.rank
            assert np.array_equal(state.adapter.factors(m.name)[1], start.factors(m.name)[1])


def test_a_client_that_leaves_the_basis_is_refused() -> None:
    chosen = recipe("fed-sb")
    state = chosen.start(initial_adapter(plain_spec(), 0))
    tensors = dict(honest(chosen, state.adapter, 1).tensors)
    key_a, _ = state.adapter.spec.modules[0].keys
    tensors[key_a] = tensors[key_a] + np.float32(1e-3)
    one = Update("c", 1, state.adapter.digest, Adapter(state.adapter.spec, tensors), 1.0)
    with pytest.raises(UpdateError, match="frozen-changed"):
        chosen.begin(state).add(one)


def test_a_run_starts_in_the_basis_or_not_at_all() -> None:
    spec = plain_spec()
    fresh = initial_adapter(spec, 3)
    started = enter(fresh, 5)
    for m in spec.modules:
        assert not started.factors(m.name)[0].any()
        assert np.array_equal(started.factors(m.name)[1], np.float32(basis(spec, 5)[m.name][1]))
    for tensor in spec.others:
        assert np.array_equal(started.tensors[tensor.key], fresh.tensors[tensor.key])
    grown = settle(with_core(spec, {m.name: np.eye(4) for m in spec.modules}, 5), 5)
    assert enter(grown, 5).digest == grown.digest
    with pytest.raises(CoreError, match="public basis of seed 5"):
        enter(random_adapter(spec, 0), 5)
    assert recipe("fedit").start(fresh).adapter.digest == initial_state(fresh).adapter.digest


def test_cores_that_do_not_fit_are_refused() -> None:
    spec = plain_spec()
    with pytest.raises(CoreError, match=r"missing or unknown for modules \['layer.1.query'\]"):
        with_core(spec, {"layer.0.query": np.eye(4)}, 0)
    with pytest.raises(CoreError, match=r"shape \(3, 3\), expected \(4, 4\)"):
        with_core(spec, {m.name: np.eye(3) for m in spec.modules}, 0)
