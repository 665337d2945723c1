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
# Where it is so large, a factor is mostly rounding: columns depend on each other, or nearly.
_HOPELESS = 1e13
_BLOCK = 48
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
        found = _factor(gram, 0.0)
        shifted = found is None and number == 0
        if shifted:
            found = _factor(gram, _shift(gram, len(basis)))
        if found is None:
            break
        factor, inverse, size = found
        step = factor * sizes
        triangle = step if triangle is None else step @ triangle
        inverse /= sizes[:, None]
        if size <= _WELL * len(factor) and not shifted:
            return ThinQR(basis, inverse, triangle, number == 0)
        basis = basis @ inverse
    q, r = np.linalg.qr(matrix)
    return ThinQR(q, np.eye(len(r)), r, well=False)


def _factor(gram: Array, shift: float) -> tuple[Array, Array, float] | None:
    """The upper Cholesky factor, its inverse and the inverse's squared norm; None if hopeless."""
    try:
        found = np.linalg.cholesky(gram + shift * np.eye(len(gram)), upper=True)
    except np.linalg.LinAlgError:
        return None
    factor = np.asarray(found, np.float64)
    inverse = _inverse(factor)
    size = float(np.sum(inverse**2))
    return (factor, inverse, size) if size < _HOPELESS else None


def _shift(gram: Array, rows: int) -> float:
    """What makes a Gram matrix positive definite in spite of rounding (Fukaya et al. 2020, 4.2)."""
    count = len(gram)
    return 11 * (rows * count + count * (count + 1)) * _UNIT * float(np.linalg.norm(gram))


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
