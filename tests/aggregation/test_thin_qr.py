from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.thin_qr import thin_qr
from tests.aggregation.adapters import FEW


def graded(rows: int, columns: int, digits: float, seed: int) -> np.ndarray:
    """A matrix whose singular values fall over so many powers of ten."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    return np.asarray((left * np.logspace(0, -digits, columns)) @ right.T)


def drifted(rows: int, columns: int, digits: float, seed: int) -> np.ndarray:
    """What clients send: one factor, and little moves of it, side by side."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((rows, 4))
    moves = 10.0**-digits * rng.standard_normal((rows, columns))
    return np.asarray(np.tile(start, columns // 4) + moves)


def between(rows: int, columns: int, digits: float, seed: int) -> np.ndarray:
    """The like of which comes twice in the midst of what is new, exactly or nearly."""
    rng = np.random.default_rng(seed)
    third = columns // 4
    first, last = rng.standard_normal((rows, third)), rng.standard_normal((rows, third))
    near = first + 10.0**-digits * rng.standard_normal((rows, third))
    rest = rng.standard_normal((rows, columns - 3 * third))
    return np.hstack([first, near, rest, last])


@FEW
@given(
    st.sampled_from([graded, drifted, between]),
    st.integers(24, 90),
    st.sampled_from([4, 12, 24]),
    st.floats(0, 17),
    st.floats(-6, 6),
    st.integers(0, 99),
)
def test_the_basis_is_orthonormal_and_nothing_is_lost_at_any_condition(
    make: object, rows: int, columns: int, digits: float, size: float, seed: int
) -> None:
    x = make(rows, columns, digits, seed)  # type: ignore[operator]
    x = x * np.logspace(0, size, columns)  # clients of very different weights
    found = thin_qr(x)
    q = found.times(np.eye(columns))
    assert np.abs(q.T @ q - np.eye(columns)).max() < 1e-13
    lengths = np.linalg.norm(x, axis=0)
    assert (np.abs(q @ found.R - x) / lengths).max() < 1e-13
    core = np.random.default_rng(seed).standard_normal((3, columns))
    assert np.allclose(found.rows(core), core @ q.T, atol=1e-12)


@pytest.mark.parametrize("digits", [2, 6, 11])
def test_ill_conditioned_stacks_need_no_reflections(
    digits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = drifted(400, 40, digits, 0)

    def refuse(*_: object) -> None:
        raise AssertionError("Householder's QR is several times as slow")

    monkeypatch.setattr(np.linalg, "qr", refuse)
    q = thin_qr(x).times(np.eye(40))
    assert np.abs(q.T @ q - np.eye(40)).max() < 1e-12


def test_dependent_and_empty_columns_get_a_basis_all_the_same() -> None:
    x = drifted(50, 8, 1, 0)
    for bad in (np.hstack([x, x[:, :3]]), np.hstack([x, np.zeros((50, 2))]), np.zeros((50, 2))):
        found = thin_qr(bad)
        q = found.times(np.eye(bad.shape[1]))
        assert np.abs(q.T @ q - np.eye(len(q.T))).max() < 1e-12
        assert np.allclose(q @ found.R, bad, atol=1e-13)
        assert not found.well


def test_only_independent_columns_count_as_well_conditioned() -> None:
    rng = np.random.default_rng(0)
    assert thin_qr(rng.standard_normal((200, 20)) * np.logspace(-8, 8, 20)).well
    assert not thin_qr(drifted(200, 20, 3, 0)).well
