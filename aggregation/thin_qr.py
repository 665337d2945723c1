"""Orthonormal bases of tall matrices by matrix products, several times as fast as by reflections.

    >>> import numpy as np
    >>> x = np.vander(np.linspace(0.0, 1.0, 50), 8)
    >>> found = thin_qr(x)
    >>> q = found.times(np.eye(8))
    >>> bool(np.allclose(q.T @ q, np.eye(8), atol=1e-14)), bool(np.allclose(q @ found.R, x))
    (True, True)

CholeskyQR2 (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015, "Roundoff error analysis of the
CholeskyQR2 algorithm", algorithm 2): R is the Cholesky factor of X^T X, and Q = X R^-1 is made
orthonormal to the last digits by doing the same with Q once more. For what is so ill-conditioned
that the first factor does not exist, a shifted one comes before (Fukaya, Kannan, Nakatsukasa,
Yamamoto and Yanagisawa 2020, "Shifted Cholesky QR for computing the QR factorization of
ill-conditioned matrices", algorithm 4.2). What even that does not settle, such as columns that
depend on each other, goes to Householder's QR.

Where we differ: columns are scaled to norm 1 first, so that clients of small weight do no harm; a
second pass is left out where the first factor shows that it would change nothing, and the last
pass is not multiplied out, since Q itself is rarely wanted, but Q times something small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_PASSES = 4
# The squared Frobenius norm of an inverse factor, in units of that of an orthonormal basis, up to
# which Q is orthonormal to within about 1e-13: the error grows with the condition number squared.
_WELL = 4.0
_BLOCK, _LEAF = 48, 24  # sizes at which triangles are not halved any more
_FEW_DIGITS = 1e3
_UNIT = float(np.finfo(np.float64).eps) / 2


@dataclass(frozen=True, eq=False)
class ThinQR:
    """``X = Q R`` with orthonormal columns in ``Q = matrix @ turn``, which is not multiplied out.

    Attributes:
        matrix: float64 of shape (m, n).
        turn: float64 of shape (n, n), well-conditioned.
        R: float64 of shape (n, n).
        well: whether X is well-conditioned, the lengths of its columns aside.
    """

    matrix: Array
    turn: Array
    R: Array
    well: bool

    def times(self, core: Array) -> Array:
        """``Q @ core``, of shape (m, k), for a core of shape (n, k)."""
        return self.matrix @ (self.turn @ core)

    def rows(self, core: Array) -> Array:
        """``core @ Q^T``, of shape (k, m), for a core of shape (k, n)."""
        return (core @ self.turn.T) @ self.matrix.T


def thin_qr(matrix: Array) -> ThinQR:
    """The QR factorisation of a matrix with no more columns than rows.

    Args:
        matrix: X of shape (m, n), m at least n; any rank.
    """
    basis, triangle = matrix, None
    for number in range(_PASSES):
        gram = basis.T @ basis
        sizes = np.sqrt(np.diagonal(gram))
        if not sizes.all():
            break
        gram /= sizes[:, None] * sizes
        factor, shifted = _cholesky(gram, len(basis), may_shift=number == 0)
        if factor is None:
            break
        step = factor * sizes
        triangle = step if triangle is None else step @ triangle
        inverse = _inverse(factor)
        if not shifted and float(np.sum(inverse**2)) <= _WELL * len(factor):
            return ThinQR(basis, inverse / sizes[:, None], triangle, number == 0)
        rows = basis.T / sizes[:, None]
        _substitute(rows, factor)
        basis = rows.T
    q, r = np.linalg.qr(matrix)
    return ThinQR(q, np.eye(len(r)), r, well=False)


def _cholesky(gram: Array, rows: int, *, may_shift: bool) -> tuple[Array | None, bool]:
    """The upper Cholesky factor of a Gram matrix of unit columns, and whether of a shifted one.

    The shift makes it positive definite in spite of rounding (Fukaya et al. 2020, section 4.2).
    """
    count, shift = len(gram), 0.0
    for _ in range(1 + may_shift):
        try:
            factor = np.linalg.cholesky(gram + shift * np.eye(count), upper=True)
            return np.asarray(factor, np.float64), shift > 0
        except np.linalg.LinAlgError:
            size = float(np.linalg.norm(gram))
            shift = 11 * (rows * count + count * (count + 1)) * _UNIT * size
    return None, False


def _inverse(upper: Array) -> Array:
    """The inverse of an upper triangle, by halves."""
    count = len(upper)
    if count <= _BLOCK:
        return np.asarray(np.linalg.inv(upper), np.float64)
    half = count // 2
    out = np.zeros_like(upper)
    out[:half, :half] = _inverse(upper[:half, :half])
    out[half:, half:] = _inverse(upper[half:, half:])
    out[:half, half:] = -(out[:half, :half] @ upper[:half, half:]) @ out[half:, half:]
    return out


def _substitute(rows: Array, upper: Array) -> None:
    """Solve ``Q U = X`` for an upper triangle U; rows are X^T before and Q^T after.

    By substitution, in which what rounding does to X stays small however ill-conditioned U is; a
    product with an inverse loses as many digits as the condition number has, so that only small
    and well-conditioned blocks are inverted.
    """
    count = len(upper)
    if count > _LEAF:
        half = count // 2
        _substitute(rows[:half], upper[:half, :half])
        rows[half:] -= upper[:half, half:].T @ rows[:half]
        _substitute(rows[half:], upper[half:, half:])
        return
    inverse = np.linalg.inv(upper)
    if np.linalg.norm(upper) * np.linalg.norm(inverse) < _FEW_DIGITS:
        rows[:] = inverse.T @ rows
        return
    for j in range(count):
        rows[j] -= upper[:j, j] @ rows[:j]
        rows[j] /= upper[j, j]
