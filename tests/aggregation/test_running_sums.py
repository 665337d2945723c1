"""Sums of many updates: exact, whatever order and form they pass through, and of bounded size."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.recipes import recipe
from aggregation.running_sum import IndexSums, RunningSum
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from aggregation.state import GlobalState, initial_state
from aggregation.summing import ProductSums, TensorSum
from aggregation.update import Update
from tests.aggregation.adapters import (
    BASE,
    FEW,
    moved,
    plain_spec,
    products,
    random_adapter,
    relative,
    specs,
)

SEEDS = st.integers(0, 999)
RANKS = st.lists(st.integers(1, 4), min_size=1, max_size=60)


def terms(d_out: int, d_in: int, ranks: list[int], seed: int) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.standard_normal((d_out, rank)).astype(np.float32),
            rng.standard_normal((rank, d_in)).astype(np.float32),
        )
        for rank in ranks
    ]


@FEW
@given(st.integers(4, 9), st.integers(4, 9), RANKS, SEEDS)
def test_a_running_sum_is_the_dense_one_in_any_form(
    d_out: int, d_in: int, ranks: list[int], seed: int
) -> None:
    running, expected = RunningSum(d_out, d_in), np.zeros((d_out, d_in))
    for k, (left, right) in enumerate(terms(d_out, d_in, ranks, seed)):
        weight = 0.1 + k % 3
        running.add(left, right, weight)
        expected += weight * left.astype(np.float64) @ right.astype(np.float64)
        if k % 7 == 0:  # looking at it changes nothing
            assert relative(running.result(0.5).dense(), 0.5 * expected) < 1e-13
    assert relative(running.result(1.0).dense(), expected) < 1e-13
    assert running.result(1.0).rank <= max(d_out, d_in, sum(ranks))
    other = RunningSum(d_out, d_in)
    other.add(*terms(d_out, d_in, [2], seed)[0], 1.0)
    more = other.result(1.0).dense()
    other.absorb(running, -2.0)
    assert relative(other.result(1.0).dense(), more - 2.0 * expected) < 1e-12


def test_a_sum_stays_thin_while_its_rank_is_below_the_dimensions() -> None:
    """The SVD of a matrix costs many times that of factors of half its rank."""
    running = RunningSum(16, 24)
    for left, right in terms(16, 24, [3] * 5, 0):
        running.add(left, right, 1.0)
    assert running.result(1.0).rank == 15
    running.add(*terms(16, 24, [1], 1)[0], 1.0)
    assert running.result(1.0).rank == 16


@FEW
@given(st.integers(4, 9), st.integers(4, 9), RANKS, SEEDS)
def test_indices_are_kept_apart_until_their_shares_are_known(
    d_out: int, d_in: int, ranks: list[int], seed: int
) -> None:
    sums, shares = IndexSums(d_out, d_in), [1.0, 0.5, 0.25, 0.125][: max(ranks)]
    expected = np.zeros((d_out, d_in))
    for left, right in terms(d_out, d_in, ranks, seed):
        sums.add(left, right, 2.0)
        scaled = left.astype(np.float64) * shares[: len(right)]
        expected += 2.0 * scaled @ right.astype(np.float64)
    assert len(sums) == max(ranks)
    assert relative(sums.result(shares).dense(), expected) < 1e-13
    assert relative(sums.result(shares).dense(), expected) < 1e-13


@FEW
@given(specs(), SEEDS, st.lists(st.sampled_from("AB2-"), min_size=1, max_size=8))
def test_products_are_exact_whichever_factor_moved(
    spec: AdapterSpec, seed: int, kinds: list[str]
) -> None:
    """A, B, both or none of them, from two starts, in any mixture."""
    starts = [random_adapter(spec, seed), random_adapter(spec, seed + 1)]
    sums = ProductSums(spec)
    expected = {m.name: np.zeros((m.d_out, m.d_in)) for m in spec.modules}
    for k, kind in enumerate(kinds):
        start = starts[k % 2]
        trained = moved(start, seed + k)
        tensors = dict(trained.tensors)
        for m in spec.modules:
            for key, frozen in zip(m.keys, (kind in "B-", kind in "A-"), strict=True):
                if frozen:
                    tensors[key] = start.tensors[key]
        trained = Adapter(spec, tensors)
        sums.add(trained, start, 1.0 + k)
        for name, after in products(trained).items():
            expected[name] += (1.0 + k) * (after - products(start)[name])
    found = sums.result(2.0)
    assert list(found) == [m.name for m in spec.modules]
    assert len(found) == len(spec.modules)
    assert "nowhere" not in found
    with pytest.raises(KeyError):
        found["nowhere"]
    for name, matrix in expected.items():
        size = max(np.linalg.norm(matrix), 1.0)
        assert np.linalg.norm(found[name].dense() - 2.0 * matrix) < 1e-11 * size
        assert relative(found[name].dense(), found[name].dense()) == 0


def test_a_frozen_factor_costs_one_term_and_changes_by_exactly_nothing() -> None:
    spec = plain_spec((4, 4), width=200)
    start = random_adapter(spec, 0)
    sums, tensors = ProductSums(spec), TensorSum(spec, spec.layout)
    frozen = [m.keys[0] for m in spec.modules]
    for k in range(30):
        trained = moved(start, k)
        trained = Adapter(spec, {**trained.tensors, **{key: start.tensors[key] for key in frozen}})
        sums.add(trained, start, 1.0 / 3)
        tensors.add(trained, start, 1.0 / 3)
    assert all(matrix.rank == 4 for matrix in sums.result(1.0).values())
    found = tensors.finish(1.0)
    assert not any(found[key].any() for key in frozen)
    assert all(found[m.keys[1]].any() for m in spec.modules)


def test_tensors_that_do_not_lie_together_are_summed_each_from_its_own_start() -> None:
    """Between the heads lie factors, whose size differs between clients."""
    modules = (ModuleSpec("m.query", 6, 5, 2, 4.0),)
    heads = (TensorSpec("a.weight", (2, 3)), TensorSpec("z.weight", (4,)))
    ours = AdapterSpec(BASE, modules, heads)
    theirs = replace(ours, modules=(replace(modules[0], rank=3),))
    keys = [head.key for head in heads]
    running = TensorSum(ours, keys)
    expected = dict.fromkeys(keys, 0.0)
    for k, spec in enumerate([ours, ours, theirs, ours, theirs, theirs]):
        start = random_adapter(spec, k % 2)
        trained = moved(start, 10 + k)
        running.add(trained, start, 1.5)
        for key in keys:
            change = np.subtract(trained.tensors[key], start.tensors[key], dtype=np.float64)
            expected[key] = expected[key] + 1.5 * change
    for key, value in running.finish(0.5).items():
        assert relative(value, 0.5 * np.asarray(expected[key])) < 1e-14


def peak(name: str, spec: AdapterSpec, clients: int, measure: bool) -> int:
    """Peak of what NumPy holds while so many updates come in one by one."""
    state = initial_state(random_adapter(spec, 0))
    ranks = [1, 2, 4] if recipe(name).reduce.mixed_ranks else [4]
    starts = [recipe(name).hand_out(state, spec.with_ranks(rank)) for rank in ranks]
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        reduction = recipe(name).begin(state, measure=measure)
        for k in range(clients):
            start = starts[k % len(starts)]
            noise = rng.standard_normal(start.spec.size, dtype=np.float32)
            adapter = Adapter.unpack(start.spec, start.pack() + noise)
            reduction.add(Update(f"c{k}", 1, start.digest, adapter, 1.0 + k % 3))
        reduction.finish()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "measure"),
    [("fedit", False), ("fedit", True), ("svd-warm-start", True), ("raflora", True)],
)
def test_memory_does_not_grow_with_the_number_of_clients(name: str, measure: bool) -> None:
    spec = plain_spec((4, 4), width=120)
    few, many = (peak(name, spec, count, measure) for count in (400, 800))
    assert many - few < 400 * 500  # names and weights
    assert many - few < 0.1 * 400 * 4 * spec.with_ranks(2).size


def test_a_large_module_costs_less_than_one_dense_matrix() -> None:
    """8192 x 8192, r = 16, 20 clients: 537 MB dense in float64."""
    spec = AdapterSpec(BASE, (ModuleSpec("layer.query", 8192, 8192, 16, 16.0),))
    state = GlobalState(random_adapter(spec, 0))
    tracemalloc.start()
    try:
        reduction = recipe("svd-warm-start").begin(state)
        rng = np.random.default_rng(0)
        for k in range(20):
            noise = np.float32(0.01) * rng.standard_normal(spec.size, dtype=np.float32)
            adapter = Adapter.unpack(spec, state.adapter.pack() + noise)
            reduction.add(Update(f"c{k}", 1, state.adapter.digest, adapter, 1.0))
        after, report = reduction.finish()
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < 0.5 * 8 * 8192**2
    assert after.adapter.factors("layer.query")[1].shape == (16, 8192)
    assert report.modules["layer.query"].exact_rank == 20 * 16
