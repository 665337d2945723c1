"""A matrix kept as two thin factors, scale folded in: the one algebraic type of this package.

    >>> import numpy as np
    >>> x = LowRank(np.array([[2.0], [0.0]]), np.array([[0.0, 3.0, 0.0]]))
    >>> (x + x).rank, (x + x).norm(), ((x + x) - 2 * x).norm()
    (2, 12.0, 0.0)

Adding stacks the factors, so nothing is lost and nothing dense is made; ``svd`` works on the QR
cores of the stacks (:mod:`aggregation.thin_qr`), O(R^2 (d_out + d_in) + R^3) for a stacked rank R.
All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.thin_qr import Array, thin_qr

__all__ = ["Array", "LowRank"]
_SAMPLES = 16
_CANCELLED = 1e-3  # share of a sum's terms below which too many of its digits are gone
# Squares of singular values, in units of the largest, above which a Gram matrix resolves them: all
# of them to 1e-10 of the largest, and the vectors that are wanted to 1e-12.
_ALL_ABOVE, _WANTED_ABOVE = 1e-11, 1e-3


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``B @ A`` of shape (d_out, d_in), never multiplied out.

    Attributes:
        B: float64 of shape (d_out, R).
        A: float64 of shape (R, d_in); R may exceed the dimensions until :meth:`compress`.

    Raises:
        AggregationError: if the factors do not fit together.
    """

    B: Array
    A: Array

    def __post_init__(self) -> None:
        left, right = np.asarray(self.B, np.float64), np.asarray(self.A, np.float64)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise AggregationError(f"factors of shapes {left.shape} and {right.shape} do not fit")
        object.__setattr__(self, "B", left)
        object.__setattr__(self, "A", right)

    @classmethod
    def zero(cls, d_out: int, d_in: int) -> LowRank:
        """The zero matrix, of rank 0."""
        return cls(np.zeros((d_out, 0)), np.zeros((0, d_in)))

    @classmethod
    def of(cls, adapter: Adapter, module: str) -> LowRank:
        """The update ``s B A`` that an adapter applies to one module."""
        left, right = adapter.factors(module)
        return cls(left.astype(np.float64) * adapter.spec.scale(module), right.astype(np.float64))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of stacked columns; an upper bound of the true rank."""
        return int(self.B.shape[1])

    def __add__(self, other: LowRank) -> LowRank:
        if self.shape != other.shape:
            raise AggregationError(f"cannot add matrices of shapes {self.shape} and {other.shape}")
        return LowRank(np.hstack([self.B, other.B]), np.vstack([self.A, other.A]))

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.B * factor, self.A)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __sub__(self, other: LowRank) -> LowRank:
        return self + -other

    def inner(self, other: LowRank) -> float:
        """The Frobenius inner product <self, other>, by the Gram trick: O(R R' (d_out + d_in)).

        Raises:
            AggregationError: their shapes differ.
        """
        if self.shape != other.shape:
            raise AggregationError(f"no inner product between {self.shape} and {other.shape}")
        return float(np.sum((other.B.T @ self.B) * (other.A @ self.A.T)))

    def norm(self) -> float:
        """The Frobenius norm, to nearly all digits.

        As ``inner(self)`` where its terms add up; where they cancel, as in a difference of nearly
        equal matrices, by QR, which keeps the digits.
        """
        if self.rank >= min(self.shape):
            return float(np.linalg.norm(self.dense()))
        cells = (self.B.T @ self.B) * (self.A @ self.A.T)
        total = float(cells.sum())
        if total > _CANCELLED * float(np.abs(cells).sum()):
            return math.sqrt(total)
        terms = self._distinct()
        if terms.rank == 0:
            return 0.0
        return float(np.linalg.norm(thin_qr(terms.B).R @ thin_qr(terms.A.T).R.T))

    def svd(self, most: int | None = None, *, all_rows: bool = False) -> tuple[Array, Array, Array]:
        """The thin SVD (U, S, Vt), U (d_out, k), S (k,) descending, Vt (k, d_in).

        k is the smaller of the dimensions and the number of terms ``b_j a_j`` that are not nothing,
        those with the same a_j counted once. Each row of Vt has its entry of largest magnitude
        positive, so that the result does not depend on LAPACK's choice of signs.

        Args:
            most: make no more than this many singular vectors; the singular values are all there.
            all_rows: count every term, so that Vt spans all rows of A, whatever B makes of them.
        """
        if self.rank >= min(self.shape) + all_rows:
            # The factors are no smaller than the matrix: two more QRs would only cost time. (But
            # of a matrix that is not of full rank it does not tell which rows A has besides.)
            left, values, rows = _leading(self.dense(), most, by_gram=True)
            signs = _signs(rows)
            return left * signs, values, rows * signs[:, None]
        terms = self if all_rows else self._distinct()
        if terms.rank == 0:
            return np.zeros((self.shape[0], 0)), np.zeros(0), np.zeros((0, self.shape[1]))
        basis_out, basis_in = thin_qr(terms.B), thin_qr(terms.A.T)
        well = basis_out.well and basis_in.well
        left, values, right = _leading(basis_out.R @ basis_in.R.T, most, by_gram=well)
        rows = basis_in.rows(right)
        signs = _signs(rows)
        rows *= signs[:, None]
        return basis_out.times(left * signs), values, rows

    def truncate(self, rank: int) -> tuple[LowRank, LowRank]:
        """The best approximation of this rank (Eckart and Young 1936), and what it leaves out.

        Args:
            rank: the rank to keep; more than there is keeps everything.

        Returns:
            (kept, residual): U S and Vt of the largest ``rank`` singular values, and of the others;
            their sum is this matrix.
        """
        _check_rank(rank)
        left, values, right = self.svd()
        scaled = left * values
        return (
            LowRank(scaled[:, :rank], right[:rank]),
            LowRank(scaled[:, rank:], right[rank:]),
        )

    def best(self, rank: int) -> LowRank:
        """What :meth:`truncate` keeps, without the work for what it leaves out."""
        _check_rank(rank)
        left, values, right = self.svd(rank)
        return LowRank(left * values[:rank], right)

    def compress(self, tolerance: float = 0.0) -> LowRank:
        """The same matrix with rank at most min(d_out, d_in), so that a running sum stays bounded.

        Args:
            tolerance: 0 drops only what is exactly nothing; above, singular values up to
                ``tolerance`` times the largest are dropped as well.
        """
        if tolerance == 0.0 and self.rank <= min(self.shape):
            return self
        left, values, right = self.svd()
        keep = int(np.sum(values > tolerance * values[:1].sum()))
        return LowRank(left[:, :keep] * values[:keep], right[:keep])

    def dense(self) -> Array:
        """The matrix itself, of shape (d_out, d_in); for tests and plots."""
        return self.B @ self.A

    def _distinct(self) -> LowRank:
        """The same sum without terms that are nothing, and with equal rows of A taken together.

        Where clients kept A, or a start comes in once added and once subtracted, that is most of
        the stack; and factors with equal columns would be as ill-conditioned as can be.
        """
        samples = np.ascontiguousarray(self.A[:, :: _step(self.A.shape[1])])
        first = _first_equal(self.A, samples)
        alive = first == np.arange(self.rank)
        sums: dict[int, Array] = {}
        for j in np.flatnonzero(~alive).tolist():
            one = int(first[j])
            sums[one] = sums.get(one, self.B[:, one]) + self.B[:, j]
        seen = samples.any(axis=1) & self.B[:: _step(len(self.B))].any(axis=0)
        for j in np.flatnonzero(alive & ~seen).tolist():
            alive[j] = self.A[j].any() and (j in sums or self.B[:, j].any())
        for j, column in sums.items():
            alive[j] &= column.any()
        if alive.all():
            return self
        left, place = self.B[:, alive], np.cumsum(alive) - 1
        for j, column in sums.items():
            if alive[j]:
                left[:, place[j]] = column
        return LowRank(left, self.A[alive])


def _step(count: int) -> int:
    return max(1, count // _SAMPLES)


def _first_equal(rows: Array, samples: Array) -> npt.NDArray[np.intp]:
    """For every row the index of the first one that is equal to it, bit for bit.

    Args:
        rows: float64 of shape (n, d).
        samples: some columns of it; only rows that agree in them are looked at as a whole.
    """
    data, width = samples.tobytes(), samples.strides[0]
    groups: dict[bytes, list[int]] = {}
    for j in range(len(rows)):
        groups.setdefault(data[j * width : (j + 1) * width], []).append(j)
    first = np.arange(len(rows))
    for group in groups.values():
        if len(group) > 1:
            seen: dict[bytes, int] = {}
            for j in group:
                first[j] = seen.setdefault(rows[j].tobytes(), j)
    return first


def _leading(matrix: Array, most: int | None, *, by_gram: bool) -> tuple[Array, Array, Array]:
    """The SVD, with no more than so many singular vectors.

    From the eigenvectors of the Gram matrix, in half the time, where that costs no accuracy: its
    error in a singular value is eps (s_1 / s_k) of s_1, and that in the angle between two left
    vectors eps s_1^2 / (s_j s_k).

    Args:
        matrix: any.
        most: so many vectors; None for all.
        by_gram: whether to try it; otherwise the matrix is known to be too ill-conditioned.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _leading(matrix.T, most, by_gram=by_gram)
        return right.T, values, left.T
    if by_gram:
        squares, turned = np.linalg.eigh(matrix.T @ matrix)
        wanted = squares[-min(len(squares), most or len(squares))]
        if squares[0] > _ALL_ABOVE * squares[-1] and wanted > _WANTED_ABOVE * squares[-1]:
            values = np.sqrt(squares[::-1])
            right = np.ascontiguousarray(turned[:, ::-1][:, :most])
            return matrix @ right / values[: right.shape[1]], values, right.T
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :most], values, right[:most]


def _signs(rows: Array) -> Array:
    """By row the sign of the entry of largest magnitude."""
    if not rows.size:
        return np.ones(len(rows))
    return np.where(rows.max(axis=1) < -rows.min(axis=1), -1.0, 1.0)


def _check_rank(rank: int) -> None:
    if rank < 0:
        raise AggregationError(f"rank={rank} must be 0 or more")
