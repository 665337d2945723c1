from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.partition import (
    Dirichlet,
    Iid,
    Natural,
    PartitionError,
    Pathological,
    Scheme,
    SizeSkewed,
    Split,
    make_split,
)

LABELS = np.random.default_rng(0).integers(0, 4, size=1000)
SCHEMES = [Iid(), Dirichlet(0.1), Dirichlet(100.0), Pathological(2), SizeSkewed(1.5)]


def split(scheme: Scheme, **changes: object) -> Split:
    settings = {"clients": 10, "heldout": 0.1, "minimum": 20, "seed": 3, **changes}
    return make_split(LABELS, scheme, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_row_is_used_exactly_once_and_nobody_is_short(scheme: Scheme) -> None:
    made = split(scheme)
    everything = np.concatenate([*made.clients, made.heldout])
    assert sorted(everything.tolist()) == list(range(1000))
    assert len(made.heldout) == 100
    assert len(made.clients) == 10
    assert min(len(rows) for rows in made.clients) >= 20


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_seed_decides(scheme: Scheme) -> None:
    one, same, other = split(scheme), split(scheme), split(scheme, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(one.clients, same.clients, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one.clients, other.clients, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.sampled_from(SCHEMES),
    st.lists(st.integers(0, 3), min_size=60, max_size=200),
)
def test_all_rows_for_any_labels(
    seed: int, clients: int, scheme: Scheme, labels: list[int]
) -> None:
    array = np.array(labels)
    made = make_split(array, scheme, clients=clients, heldout=0.1, minimum=4, seed=seed)
    everything = np.concatenate([*made.clients, made.heldout])
    assert sorted(everything.tolist()) == list(range(len(labels)))
    assert min(len(rows) for rows in made.clients) >= 4


def shares(made: Split) -> np.ndarray:
    return np.array([np.bincount(LABELS[r], minlength=4) / len(r) for r in made.clients])


def test_shapes_are_what_they_are_called() -> None:
    even, skewed = shares(split(Dirichlet(1000.0))), shares(split(Dirichlet(0.05)))
    assert even.std(axis=0).max() < 0.1 < skewed.std(axis=0).max()
    few = shares(split(Pathological(1), minimum=1))
    assert ((few > 0).sum(axis=1) <= 2).all()  # a shard may straddle two classes
    sizes = sorted((len(r) for r in split(SizeSkewed(1.5)).clients), reverse=True)
    assert sizes[0] > 8 * sizes[-1]
    sizes = [len(r) for r in split(Iid()).clients]
    assert max(sizes) - min(sizes) <= 1


def test_the_heldout_rows_keep_the_proportions_of_the_classes() -> None:
    made = split(Iid(), heldout=0.2)
    whole = np.bincount(LABELS) / 1000
    kept = np.bincount(LABELS[made.heldout]) / 200
    assert np.abs(whole - kept).max() < 0.01


def test_natural_groups_stay_whole() -> None:
    groups = np.repeat(np.arange(5), 200)
    made = split(Natural(groups), clients=3)
    owners = [set(groups[rows].tolist()) for rows in made.clients]
    assert sum(len(o) for o in owners) == 5
    assert set().union(*owners) == set(range(5))
    with pytest.raises(PartitionError, match="5 groups, too few for 6 clients"):
        split(Natural(groups), clients=6)
    lonely = np.array([0] * 990 + [1] * 10)
    with pytest.raises(PartitionError, match="fewer than the minimum of 20"):
        split(Natural(lonely), clients=2)


def test_an_empty_partition_is_refused() -> None:
    with pytest.raises(PartitionError, match="cannot give 1000 clients 1 rows each"):
        split(Iid(), clients=1000, minimum=1)
    with pytest.raises(PartitionError, match="clients=0"):
        split(Iid(), clients=0)


def test_a_limit_takes_a_sample_in_proportion() -> None:
    made = split(Iid(), limit=400, minimum=10)
    everything = np.concatenate([*made.clients, made.heldout])
    assert len(set(everything.tolist())) == 400
    drawn = np.bincount(LABELS[everything]) / 400
    assert np.abs(drawn - np.bincount(LABELS) / 1000).max() < 0.01
