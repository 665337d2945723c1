from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import AggregationError
from aggregation.low_rank import LowRank
from tests.aggregation.adapters import FEW, relative

SIZES = st.integers(1, 9)


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
    assert LowRank.zero(3, 4).norm() == 0
