from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import AggregationError
from aggregation.low_rank import LowRank
from tests.aggregation.adapters import FEW, relative

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 99)


def matrix(d_out: int, d_in: int, rank: int, seed: int) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in)))


@FEW
@given(SIZES, SIZES, st.integers(0, 12), st.integers(0, 12), st.integers(0, 99))
def test_algebra_is_that_of_the_dense_matrices(
    d_out: int, d_in: int, r: int, q: int, seed: int
) -> None:
    x, y = matrix(d_out, d_in, r, seed), matrix(d_out, d_in, q, seed + 1)
    a, b = x.dense(), y.dense()
    assert relative((x + y).dense(), a + b) < 1e-12
    assert relative((-x).dense(), -a) == 0
    assert relative((2.5 * x - y).dense(), 2.5 * a - b) < 1e-12
    assert x.inner(y) == pytest.approx(float(np.sum(a * b)), rel=1e-9, abs=1e-9)
    assert x.norm() == pytest.approx(float(np.linalg.norm(a)), rel=1e-12)


@FEW
@given(SIZES, SIZES, st.integers(0, 12), st.integers(0, 99))
def test_svd_is_the_dense_one_with_fixed_signs(d_out: int, d_in: int, r: int, seed: int) -> None:
    x = matrix(d_out, d_in, r, seed)
    u, s, vt = x.svd()
    dense = np.linalg.svd(x.dense(), compute_uv=False)[: len(s)]
    assert relative(s, dense) < 1e-10
    assert len(s) == min(r, d_out, d_in)
    assert relative((u * s) @ vt, x.dense()) < 1e-10
    assert relative(vt @ vt.T, np.eye(len(s))) < 1e-10
    assert all(row[np.argmax(np.abs(row))] > 0 for row in vt)


@FEW
@given(st.integers(20, 40), st.integers(20, 40), st.integers(1, 50), st.floats(0, 9), SEEDS)
def test_leading_vectors_are_those_of_the_whole_svd(
    d_out: int, d_in: int, most: int, digits: float, seed: int
) -> None:
    """By whichever way they are found: thin or dense, well-conditioned or not."""
    x = matrix(d_out, d_in, 12 + 12 * (seed % 3), seed)
    x = LowRank(x.B * np.logspace(0, -digits, x.rank), x.A)
    count, size = min(x.rank, d_out, d_in), x.norm()
    u, s, vt = x.svd(most)
    best = np.linalg.svd(x.dense(), compute_uv=False)[:count]
    kept = min(most, count)
    assert u.shape == (d_out, kept)
    assert vt.shape == (kept, d_in)
    assert np.abs(s - best).max() < 1e-9 * size
    assert np.abs(u.T @ u - np.eye(kept)).max() < 1e-11
    assert np.abs(vt @ vt.T - np.eye(kept)).max() < 1e-11
    left_over = np.linalg.norm(x.dense() - (u * s[:kept]) @ vt)
    assert abs(left_over - np.linalg.norm(best[kept:])) < 1e-9 * size
    assert relative(x.best(most).dense(), x.truncate(most)[0].dense()) < 1e-6


@FEW
@given(st.integers(1, 3), st.integers(0, 3), st.booleans(), SEEDS)
def test_terms_that_are_nothing_or_share_a_row_are_taken_together(
    copies: int, dead: int, cancel: bool, seed: int
) -> None:
    x, other = matrix(30, 40, 4, seed), matrix(30, 40, 3, seed + 1)
    stack = x + other
    for k in range(copies):
        stack += LowRank(2.0**k * x.B, x.A)
    stack += LowRank(np.zeros((30, dead)), matrix(30, 40, dead, 7).A)
    factor = 2.0**copies
    if cancel:  # a start that comes in once added and once subtracted
        stack, factor = stack + (-factor) * x, 0.0
    expected = factor * x.dense() + other.dense()
    u, s, vt = stack.svd()
    assert len(s) == (3 if cancel else 7)
    assert relative((u * s) @ vt, expected) < 1e-12
    assert stack.norm() == pytest.approx(float(np.linalg.norm(expected)), rel=1e-12)
    rows = stack.svd(all_rows=True)[2]
    if stack.rank < 30:
        assert relative(stack.A @ rows.T @ rows, stack.A) < 1e-12


def test_equal_samples_of_different_rows_do_not_make_them_one() -> None:
    right = np.ones((3, 64))
    right[1, 1] = right[2, 2] = 2.0  # between the places that are looked at first
    x = LowRank(np.eye(50)[:, :3], right)
    assert len(x.svd()[1]) == 3
    assert relative(x.truncate(3)[0].dense(), x.dense()) < 1e-12


@FEW
@given(SIZES, SIZES, st.integers(1, 12), st.integers(0, 9), st.integers(0, 99))
def test_truncation_is_the_best_of_its_rank(
    d_out: int, d_in: int, r: int, keep: int, seed: int
) -> None:
    x = matrix(d_out, d_in, r, seed)
    kept, residual = x.truncate(keep)
    tail = np.linalg.svd(x.dense(), compute_uv=False)[keep:]
    scale = x.norm()
    assert kept.rank <= keep
    assert abs(np.linalg.norm(x.dense() - kept.dense()) - np.linalg.norm(tail)) < 1e-10 * scale
    assert relative((kept + residual).dense(), x.dense()) < 1e-10


@FEW
@given(SIZES, SIZES, st.integers(0, 40), st.integers(0, 99))
def test_compressing_loses_nothing_and_bounds_the_rank(
    d_out: int, d_in: int, r: int, seed: int
) -> None:
    x = matrix(d_out, d_in, r, seed)
    small = x.compress()
    assert small.rank <= min(d_out, d_in, r)
    assert relative(small.dense(), x.dense()) < 1e-10
    twice = (x + x).compress(tolerance=1e-9)
    assert twice.rank <= min(d_out, d_in, r)
    assert relative(twice.dense(), 2 * x.dense()) < 1e-7


def test_a_difference_of_nearly_equal_matrices_keeps_its_digits() -> None:
    x = matrix(40, 30, 3, 0)
    tiny = 1e-11 * matrix(40, 30, 2, 1)
    assert (x + tiny - x).norm() == pytest.approx(tiny.norm(), rel=1e-3)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AggregationError, match="do not fit"):
        LowRank(np.zeros((3, 2)), np.zeros((1, 3)))
    with pytest.raises(AggregationError, match="cannot add"):
        matrix(3, 4, 1, 0) + matrix(4, 3, 1, 0)
    with pytest.raises(AggregationError, match="rank=-1"):
        matrix(3, 4, 1, 0).truncate(-1)
    with pytest.raises(AggregationError, match="rank=-2"):
        matrix(3, 4, 1, 0).best(-2)
    assert LowRank.zero(3, 4).norm() == 0
