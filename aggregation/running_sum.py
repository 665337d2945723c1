"""Running sums of products ``weight * B A`` in memory that does not grow with their number.

    >>> import numpy as np
    >>> running = RunningSum(3, 2)
    >>> for weight in (1.0, 3.0):
    ...     running.add(np.ones((3, 1), np.float32), np.ones((1, 2), np.float32), weight)
    >>> running.result(0.25).dense().tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]

In float64, of factors that came as float32 and are used as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from aggregation.low_rank import Array, LowRank

Factor = npt.NDArray[np.floating]
_Term = tuple[Factor, Factor, float]
# Columns that are multiplied at a time: enough for BLAS to run at full speed; of one rank index,
# where each column is of another client and keeps its adapter alive.
_BATCH, _INDEX_BATCH = 256, 64
_NUMBERS = 1 << 18  # of a product that is made at a time


class RunningSum:
    """A sum of ``weight * B A`` terms of one module, in bounded memory.

    Thin factors are kept, as they came, while their rank tells something: below the smaller
    dimension. There R (d_out + d_in) numbers of 4 bytes are less than d_out x d_in of 8, and an SVD
    of the factors costs a part of that of the matrix. From there on the sum has no better form than
    d_out x d_in numbers, and it becomes that; further terms are multiplied into it many at a time.

    Args:
        d_out: rows of B.
        d_in: columns of A.
        scratch: memory to work in, shared by the sums of all modules.
        batch: how many columns are multiplied at a time, at most.
    """

    def __init__(
        self, d_out: int, d_in: int, scratch: Scratch | None = None, batch: int = _BATCH
    ) -> None:
        self._shape = (d_out, d_in)
        self._limit = max(1, min(d_out, d_in) - 1)
        self._batch = min(batch, 4 * self._limit)
        self._scratch = scratch or Scratch()
        self._terms: list[_Term] = []
        self._columns = 0
        self._matrix: Array | None = None

    def add(self, left: Factor, right: Factor, weight: float) -> None:
        """Add ``weight * left @ right``; the arrays must not be changed afterwards."""
        self._terms.append((left, right, weight))
        self._columns += len(right)
        if self._columns > (self._limit if self._matrix is None else self._batch):
            self._condense()

    def absorb(self, other: RunningSum, factor: float) -> None:
        """Add another sum of the same shape, times a factor."""
        for left, right, weight in other._terms:
            self.add(left, right, weight * factor)
        if other._matrix is not None:
            mine = self._condense()
            mine += factor * other._matrix

    def result(self, factor: float) -> LowRank:
        """The sum so far, times a factor."""
        d_out, d_in = self._shape
        if self._matrix is None:
            left, right = np.empty((self._columns, d_out)), np.empty((self._columns, d_in))
            _stack(self._terms, left, right)
            left *= factor
            return LowRank(left.T, right)
        matrix = self._condense() * factor
        return LowRank(matrix, np.eye(d_in)) if d_in <= d_out else LowRank(np.eye(d_out), matrix)

    def _condense(self) -> Array:
        """All terms so far as one matrix."""
        d_out, d_in = self._shape
        if self._matrix is None:
            self._matrix = np.zeros(self._shape)
        for terms, columns in _blocks(self._terms, self._batch):
            left, right, product = self._scratch.take(columns, d_out, d_in)
            _stack(terms, left, right)
            for first in range(0, d_out, len(product)):
                part = slice(first, first + len(product))
                rows = self._matrix[part]
                rows += np.matmul(left[:, part].T, right, out=product[: len(rows)])
        self._terms, self._columns = [], 0
        return self._matrix


class Scratch:
    """Memory for one stack of terms at a time; it is kept, since asking for memory costs time."""

    def __init__(self) -> None:
        self._memory = np.empty(0)

    def take(self, rows: int, d_out: int, d_in: int) -> tuple[Array, Array, Array]:
        """Memory until the next call.

        Returns:
            For B^T, (rows, d_out), for A, (rows, d_in), and for rows of the product, (n, d_in).
        """
        shapes = (rows, d_out), (rows, d_in), (min(d_out, max(1, _NUMBERS // d_in)), d_in)
        ends = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        if len(self._memory) < ends[-1]:
            self._memory = np.empty(ends[-1])
        left, right, product = (
            self._memory[first:behind].reshape(shape)
            for first, behind, shape in zip(ends, ends[1:], shapes, strict=False)
        )
        return left, right, product


def _blocks(terms: Iterable[_Term], most: int) -> Iterator[tuple[list[_Term], int]]:
    """Terms in groups of at most so many columns, or of one, and how many those are."""
    block: list[_Term] = []
    columns = 0
    for term in terms:
        if block and columns + len(term[1]) > most:
            yield block, columns
            block, columns = [], 0
        block.append(term)
        columns += len(term[1])
    if block:
        yield block, columns


def _stack(terms: Iterable[_Term], left: Array, right: Array) -> None:
    """Write terms on top of each other, B transposed and with the weights in it."""
    first = 0
    for one_left, one_right, weight in terms:
        rows = slice(first, first + len(one_right))
        np.multiply(one_left.T, weight, out=left[rows], dtype=np.float64)
        right[rows] = one_right
        first = rows.stop


class IndexSums:
    """A sum of ``weight * B A`` terms of one module, kept apart by rank index.

    What an index is divided by is known only at the end.
    """

    def __init__(self, d_out: int, d_in: int) -> None:
        self._shape = (d_out, d_in)
        self._scratch = Scratch()
        self._sums: list[RunningSum] = []

    def __len__(self) -> int:
        """The highest rank that was added."""
        return len(self._sums)

    def add(self, left: Factor, right: Factor, weight: float) -> None:
        """Add ``weight * left @ right``, each of its rank indices where it belongs."""
        while len(self._sums) < len(right):
            self._sums.append(RunningSum(*self._shape, self._scratch, _INDEX_BATCH))
        for j, running in enumerate(self._sums[: len(right)]):
            running.add(left[:, j : j + 1], right[j : j + 1], weight)

    def result(self, factors: Sequence[float]) -> LowRank:
        """The sum over all indices, each times its factor."""
        total = RunningSum(*self._shape, self._scratch)
        for running, factor in zip(self._sums, factors, strict=True):
            total.absorb(running, factor)
        return total.result(1.0)
