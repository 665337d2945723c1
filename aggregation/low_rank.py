"""A matrix kept as two thin factors, scale folded in: the one algebraic type of this package.

    >>> import numpy as np
    >>> x = LowRank(np.array([[2.0], [0.0]]), np.array([[0.0, 3.0, 0.0]]))
    >>> (x + x).rank, (x + x).norm(), ((x + x) - 2 * x).norm()
    (2, 12.0, 0.0)

Adding stacks the factors, so nothing is lost and nothing dense is made; ``svd`` works on the QR
cores of the stacks, O(R^2 (d_out + d_in) + R^3) for a stacked rank R. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError

Array = npt.NDArray[np.float64]


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
        """The Frobenius inner product <self, other>, by the Gram trick: O(R R' (d_out + d_in))."""
        if self.shape != other.shape:
            raise AggregationError(f"no inner product between {self.shape} and {other.shape}")
        return float(np.sum((other.B.T @ self.B) * (other.A @ self.A.T)))

    def norm(self) -> float:
        """The Frobenius norm.

        By QR, not by ``inner(self)``: differences of nearly equal matrices keep all their digits.
        """
        if self.rank == 0:
            return 0.0
        if self.rank >= min(self.shape):
            return float(np.linalg.norm(self.B @ self.A))
        r_left: Array = np.asarray(np.linalg.qr(self.B, mode="r"))
        r_right: Array = np.asarray(np.linalg.qr(self.A.T, mode="r"))
        return float(np.linalg.norm(r_left @ r_right.T))

    def svd(self) -> tuple[Array, Array, Array]:
        """The thin SVD (U, S, Vt), U (d_out, k), S (k,) descending, Vt (k, d_in).

        k is the smaller of the stacked rank and the dimensions. Each row of Vt has its entry of
        largest magnitude positive, so that the result does not depend on LAPACK's choice of signs.
        """
        if self.rank == 0:
            return np.zeros((self.shape[0], 0)), np.zeros(0), np.zeros((0, self.shape[1]))
        if self.rank >= min(self.shape):
            # The factors are no smaller than the matrix: two more QRs would only cost time.
            left, values, right = np.linalg.svd(self.B @ self.A, full_matrices=False)
        else:
            q_left, r_left = np.linalg.qr(self.B)
            q_right, r_right = np.linalg.qr(self.A.T)
            left, values, right = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
            left, right = q_left @ left, right @ q_right.T
        largest = np.argmax(np.abs(right), axis=1)
        signs = np.where(right[np.arange(len(right)), largest] < 0, -1.0, 1.0)
        return left * signs, values, right * signs[:, None]

    def truncate(self, rank: int) -> tuple[LowRank, LowRank]:
        """The best approximation of this rank (Eckart and Young 1936), and what it leaves out.

        Args:
            rank: the rank to keep; more than there is keeps everything.

        Returns:
            (kept, residual): U S and Vt of the largest ``rank`` singular values, and of the others;
            their sum is this matrix.
        """
        if rank < 0:
            raise AggregationError(f"rank={rank} must be 0 or more")
        left, values, right = self.svd()
        scaled = left * values
        return (
            LowRank(scaled[:, :rank], right[:rank]),
            LowRank(scaled[:, rank:], right[rank:]),
        )

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
