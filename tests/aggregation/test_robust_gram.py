"""Inner products and distances of updates, against dense vectors."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.adapter import Adapter
from aggregation.robust_gram import Change, Changes
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from tests.aggregation.adapters import (
    BASE,
    FEW,
    SEEDS,
    moved,
    plain_spec,
    products,
    random_adapter,
    specs,
)


def dense(change: Change) -> np.ndarray:
    """All of a change as one vector, by the definition in the paper."""
    new, old = products(change.adapter), products(change.start)
    spec = change.adapter.spec
    others = [
        change.adapter.tensors[t.key].astype(np.float64) - change.start.tensors[t.key]
        for t in spec.others
    ]
    return np.concatenate([*((new[n] - old[n]).ravel() for n in new), *(o.ravel() for o in others)])


def check(changes: Changes) -> None:
    vectors = np.array([dense(one) for one in changes.each])
    size = np.abs(vectors @ vectors.T).max()
    assert np.abs(changes.gram - vectors @ vectors.T).max() <= 1e-11 * size
    apart = np.sum((vectors[:, None] - vectors) ** 2, axis=2)
    assert np.abs(changes.squared - apart).max() <= 1e-10 * size
    assert np.array_equal(changes.squared, changes.squared.T)
    norms = np.linalg.norm(vectors, axis=1)
    assert np.allclose([one.norm() for one in changes.each], norms, rtol=1e-10)


@FEW
@given(specs(), SEEDS, st.integers(1, 6))
def test_small_modules_of_any_kind(spec: AdapterSpec, seed: int, count: int) -> None:
    start = random_adapter(spec, seed)
    check(Changes(spec, [Change(moved(start, seed + 1 + k), start) for k in range(count)]))


@FEW
@given(st.lists(st.sampled_from([1, 2, 3, 8, 24]), min_size=1, max_size=6), SEEDS, st.booleans())
def test_mixed_ranks_and_starts(ranks: list[int], seed: int, shared: bool) -> None:
    """Thin factors, factors as large as the product, starts of their own or by rank, or zero."""
    spec = plain_spec((3, 2), width=40)
    changes = []
    for k, rank in enumerate(ranks):
        start = random_adapter(spec.with_ranks(rank), seed + (rank if shared else k), 0.5 * (k > 0))
        changes.append(Change(moved(start, seed + 100 + k), start))
    check(Changes(spec, changes))


@FEW
@given(SEEDS, st.sampled_from("AB"), st.booleans())
def test_one_factor_frozen(seed: int, frozen: str, zero: bool) -> None:
    spec = plain_spec((4, 2), width=40)
    start = random_adapter(spec, seed, 0.0 if zero and frozen == "A" else 0.5)
    changes = []
    for k in range(5):
        tensors = dict(moved(start, seed + k).tensors)
        tensors |= {key: start.tensors[key] for key in tensors if f"lora_{frozen}" in key}
        changes.append(Change(Adapter(spec, tensors), start))
    check(Changes(spec, changes))


def test_a_client_may_send_another_rank_than_it_started_from() -> None:
    start = random_adapter(plain_spec((4, 4), width=40), 0)
    others = [random_adapter(start.spec.with_ranks(rank), rank) for rank in (1, 4, 6)]
    check(Changes(start.spec, [Change(one, start) for one in others]))


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
def test_near_identical_updates_keep_their_distance(apart: float) -> None:
    """Sizes minus twice the inner product would be rounding, and even below zero."""
    spec = plain_spec((4, 4), width=40)
    start = random_adapter(spec, 0)
    far = moved(start, 1, 10.0)
    rng = np.random.default_rng(2)
    near = []
    for _ in range(6):
        tensors = {k: v * (1 + apart * rng.standard_normal(v.shape)) for k, v in far}
        for module in spec.modules:  # another gauge each: B R and R^-1 A
            turn = np.linalg.qr(rng.standard_normal((4, 4)))[0] * rng.uniform(0.5, 2.0, 4)
            key_a, key_b = module.keys
            tensors[key_b] = tensors[key_b] @ turn
            tensors[key_a] = np.linalg.inv(turn) @ tensors[key_a]
        near.append(Change(Adapter(spec, tensors), start))
    changes = Changes(spec, near)
    vectors = np.array([dense(one) for one in near])
    exact = np.sum((vectors[:, None] - vectors) ** 2, axis=2)
    off = ~np.eye(6, dtype=bool)
    assert np.abs(changes.squared - exact)[off].max() <= 1e-5 * exact[off].min()
    if apart == 1e-6:  # and the plain formula would not have done
        sizes = np.diagonal(changes.gram)
        plain = sizes[:, None] + sizes - 2 * changes.gram
        assert np.abs(plain - exact)[off].max() > 1e-4 * exact[off].min()


def test_crowds_within_crowds_keep_their_distances() -> None:
    """Colluders in pairs that hardly differ: each crowd is looked at from one of its own."""
    spec = plain_spec((3, 3), width=20)
    start = random_adapter(spec, 0)
    crowd = [moved(moved(start, 1, 10.0), 2 + k // 5, 1e-3) for k in range(20)]
    every = [Change(moved(one, 50 + k, 1e-6), start) for k, one in enumerate(crowd)]
    every += [Change(moved(start, 100 + k, 1.0), start) for k in range(3)]
    vectors = np.array([dense(one) for one in every])
    exact = np.sum((vectors[:, None] - vectors) ** 2, axis=2)
    changes = Changes(spec, every)
    off = ~np.eye(len(every), dtype=bool)
    assert np.abs(changes.squared / np.where(off, exact, 1.0) - 1)[off].max() < 1e-4
    assert np.array_equal(changes.squared, changes.squared.T)


def test_identical_updates_are_at_distance_exactly_zero() -> None:
    start = random_adapter(plain_spec(), 0)
    trained = moved(start, 1)
    changes = Changes(start.spec, [Change(trained, start)] * 3 + [Change(moved(start, 2), start)])
    assert np.array_equal(changes.squared == 0, np.pad(np.ones((3, 3)), (0, 1)) + np.eye(4) > 0)


def test_more_clients_than_one_block_holds() -> None:
    """Of several ranks, so that the blocks are cut at uneven places."""
    spec = replace(plain_spec((6,), width=120), others=())
    ranks = [1 + k % 6 for k in range(400)]
    starts = {rank: Adapter.zeros(spec.with_ranks(rank)) for rank in ranks}
    changes = [Change(moved(starts[r], k), starts[r]) for k, r in enumerate(ranks)]
    vectors = np.array([dense(one) for one in changes])
    found = Changes(spec, changes).gram
    assert np.abs(found - vectors @ vectors.T).max() <= 1e-11 * np.abs(found).max()


def test_no_dense_product_is_made() -> None:
    wide = 2048
    head = (TensorSpec("head.weight", (2, wide)),)
    spec = AdapterSpec(BASE, (ModuleSpec("query", wide, wide, 4, 8.0),), head)
    start = random_adapter(spec, 0)
    changes = Changes(spec, [Change(moved(start, k), start) for k in range(8)])
    tracemalloc.start()
    assert (changes.squared[np.triu_indices(8, 1)] > 0).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * wide * wide / 4
