"""Inner products and distances of whole updates, from their factors.

A change is ``s B A - s0 B0 A0`` in every module, and a difference in every other tensor. With
dB = sB - s0 B0 and dA = A - A0 it is ``dB A + s0 B0 dA``, in which nothing cancels, however little
a client has moved. Let Q be an orthonormal basis of the columns of all starts' B0. Then, for
U = dB - Q Q^T dB and N = Q^T dB A + Q^T s0 B0 dA,

    change_k = U_k A_k + Q N_k,   <change_k, change_l> = sum((U_l^T U_k) * (A_l A_k^T)) + <N_k, N_l>

which costs O(K^2 r^2 (d_out + d_in)) for all pairs of K clients of rank r, and never makes a dense
matrix. Ranks and scales may differ, and no rotation of a client's factors changes a number beyond
rounding. In float64 throughout.

Squared distances are sizes minus twice the inner product, which loses all digits where two large
updates nearly agree, as those of colluders do. Such are measured anew, as changes from one of them
if they share a start, else pair by pair on the factors of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.low_rank import Array, LowRank
from aggregation.spec import AdapterSpec

# Below this share of the sizes, a squared distance has lost too many of its 16 digits.
_CANCELLED = 1e-9
_COLUMNS = 1024
_NUMBERS = 1 << 22

# sB, A, s0 B0 and A0 of one change.
_Terms = tuple[Array, Array, Array, Array]


@dataclass(frozen=True, eq=False)
class Change:
    """What one client changed.

    Attributes:
        adapter: what it sent, at its own ranks.
        start: what it started from.
    """

    adapter: Adapter
    start: Adapter

    def module(self, name: str) -> LowRank:
        """The change of one module's product, in the form in which nothing cancels."""
        return _difference(self.adapter, self.start, name)

    def tensor(self, key: str) -> Array:
        """The change of one named tensor."""
        move: Array = np.subtract(
            self.adapter.tensors[key], self.start.tensors[key], dtype=np.float64
        )
        return move

    def norm(self) -> float:
        """The Frobenius norm over all modules and other tensors together."""
        spec = self.adapter.spec
        products = (self.module(m.name).norm() for m in spec.modules)
        others = (float(np.linalg.norm(self.tensor(t.key))) for t in spec.others)
        return math.hypot(*products, *others)

    def distance(self, other: Change) -> float:
        """How far two changes are apart, to nearly all digits even where they nearly agree."""
        far = self.start.digest != other.start.digest
        if not far and self.adapter.digest == other.adapter.digest:
            return 0.0
        parts = []
        for module in self.adapter.spec.modules:
            apart = _difference(self.adapter, other.adapter, module.name)
            if far:
                apart -= _difference(self.start, other.start, module.name)
            parts.append(apart.norm())
        for tensor in self.adapter.spec.others:
            parts.append(float(np.linalg.norm(self.tensor(tensor.key) - other.tensor(tensor.key))))
        return math.hypot(*parts)


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes of a round, and how they lie to each other.

    Attributes:
        spec: of the global adapter: its modules and other tensors, ranks aside.
        each: one or more changes.
    """

    spec: AdapterSpec
    each: Sequence[Change]

    @cached_property
    def gram(self) -> Array:
        """Inner products over all modules and other tensors together, of shape (K, K)."""
        gram = np.zeros((len(self.each), len(self.each)))
        for module in self.spec.modules:
            gram += _module_gram(module.name, self.each)
        for tensor in self.spec.others:
            gram += _tensor_gram(tensor.key, self.each)
        return 0.5 * (gram + gram.T)

    @cached_property
    def squared(self) -> Array:
        """Squared distances between all pairs, (K, K); exactly symmetric, never below 0."""
        sizes = np.diagonal(self.gram)
        both = sizes[:, None] + sizes
        squared = np.maximum(both - 2.0 * self.gram, 0.0)
        np.fill_diagonal(squared, 0.0)
        near = squared < _CANCELLED * both
        alike = near & self._same_start()
        for k in range(len(self.each)):
            group = np.flatnonzero(alike[k] | (np.arange(len(near)) == k))
            if len(group) > 1:
                pairs = np.ix_(group, group)
                squared[pairs] = np.where(alike[pairs], self._from(k, group), squared[pairs])
                near[pairs] &= ~alike[pairs]
                alike[pairs] = False
        for k, other in np.argwhere(np.triu(near, 1)):
            apart = self.each[k].distance(self.each[other])
            squared[k, other] = squared[other, k] = apart**2
        return squared

    def _same_start(self) -> npt.NDArray[np.bool_]:
        """Which pairs began at the same adapter, (K, K)."""
        numbers: dict[str, int] = {}
        starts = [numbers.setdefault(one.start.digest, len(numbers)) for one in self.each]
        return np.equal.outer(starts, starts)

    def _from(self, origin: int, members: npt.NDArray[np.intp]) -> Array:
        """Squared distances between some that share a start, seen from one of them.

        Their changes from that one are as small as they are far apart, so nothing cancels; and if
        some of them are nearer still, the same is done again among those, without that one.
        """
        seen = self.each[origin].adapter
        return Changes(self.spec, [Change(self.each[k].adapter, seen) for k in members]).squared

    def around(self, middle: int) -> Array:
        """Inner products of all changes relative to one of them, of shape (K, K).

        From distances where those were measured anew, or from inner products: whichever rounding
        does less to. (Between a near and a far change only the second has any digits.)

        Args:
            middle: index of the change that the others are relative to.
        """
        gram, squared = self.gram, self.squared
        lengths = np.sqrt(np.diagonal(gram))
        both = lengths[:, None] ** 2 + lengths**2
        unsure = np.where(squared < _CANCELLED * both, squared, both)  # in units of the rounding
        one, other = squared[middle], squared[:, middle : middle + 1]
        from_distances = 0.5 * (one + other - squared)
        from_products = gram - gram[middle] - gram[:, middle : middle + 1] + gram[middle, middle]
        lost = (lengths[:, None] + lengths[middle]) * (lengths + lengths[middle])
        better = unsure + unsure[middle] + unsure[:, middle : middle + 1] < lost
        return np.asarray(np.where(better, from_distances, from_products))


def _difference(new: Adapter, old: Adapter, name: str) -> LowRank:
    """The product of one module in one adapter minus that in another, without cancelling."""
    width = max(new.spec.module(name).rank, old.spec.module(name).rank)
    (left, right), (left0, right0) = _sides(new, name, width), _sides(old, name, width)
    return LowRank(np.hstack([left - left0, left0]), np.vstack([right, right - right0]))


def _sides(adapter: Adapter, name: str, width: int) -> tuple[Array, Array]:
    """One module's sB and A, widened with zeros."""
    left, right = adapter.factors(name)
    rank = left.shape[1]
    wide_left, wide_right = np.zeros((len(left), width)), np.zeros((width, right.shape[1]))
    np.multiply(left, adapter.spec.scale(name), out=wide_left[:, :rank], dtype=np.float64)
    wide_right[:rank] = right
    return wide_left, wide_right


def _terms(name: str, changes: Sequence[Change]) -> list[_Terms]:
    """One module of all changes; a start that several clients share is there once."""
    starts: dict[tuple[str, int], tuple[Array, Array]] = {}
    terms = []
    for one in changes:
        width = max(one.adapter.spec.module(name).rank, one.start.spec.module(name).rank)
        key = (one.start.digest, width)
        if key not in starts:
            starts[key] = _sides(one.start, name, width)
        terms.append((*_sides(one.adapter, name, width), *starts[key]))
    return terms


def _module_gram(name: str, changes: Sequence[Change]) -> Array:
    """Inner products of one module's changes."""
    terms = _terms(name, changes)
    if all(np.array_equal(right, right0) for _, right, _, right0 in terms):
        # A is frozen, and the basis belongs on its side: then all U are zero.
        terms = [(b.T, a.T, d.T, c.T) for a, b, c, d in terms]
    d_out, d_in = len(terms[0][0]), terms[0][1].shape[1]
    lefts = [left - left0 for left, _, left0, _ in terms]
    starts = {
        (one.start.digest, left0.shape): left0
        for one, (_, _, left0, _) in zip(changes, terms, strict=True)
    }
    origins = [left0 for left0 in starts.values() if left0.any()]
    cost = sum(left0.shape[1] for left0 in origins) * d_in
    if any(left.any() for left in lefts):
        cost += max(len(right) for _, right, _, _ in terms) ** 2 * (d_out + d_in)
    if cost >= d_out * d_in:  # the factors are no smaller than the product
        return _row_gram(None, lefts, terms)
    gram = np.zeros((len(terms), len(terms)))
    if origins:
        basis, _ = np.linalg.qr(np.hstack(origins))
        gram += _row_gram(basis, lefts, terms)
        lefts = [left - basis @ (basis.T @ left) for left in lefts]
    if any(left.any() for left in lefts):
        gram += _factor_gram(lefts, [right for _, right, _, _ in terms])
    return gram


def _row_gram(basis: Array | None, lefts: Sequence[Array], terms: Sequence[_Terms]) -> Array:
    """Inner products of ``N = Q^T change``, or of the whole change, a few rows at a time."""
    gram = np.zeros((len(terms), len(terms)))
    count = len(lefts[0]) if basis is None else basis.shape[1]
    step = max(1, _NUMBERS // (len(terms) * terms[0][1].shape[1]))
    for first in range(0, count, step):
        part = slice(first, first + step)

        def rows(matrix: Array, part: slice = part) -> Array:
            return matrix[part] if basis is None else basis[:, part].T @ matrix

        inside = [
            rows(left) @ right + rows(left0) @ (right - right0)
            for left, (_, right, left0, right0) in zip(lefts, terms, strict=True)
        ]
        vectors = np.stack([found.ravel() for found in inside])
        gram += vectors @ vectors.T
    return gram


def _factor_gram(lefts: Sequence[Array], rights: Sequence[Array]) -> Array:
    """Inner products of ``left @ right``, a block of clients against another at a time."""
    widths = [len(right) for right in rights]
    step = max(1, _COLUMNS // max(widths))
    blocks = []
    for first in range(0, len(widths), step):
        members = slice(first, first + step)
        offsets = np.concatenate([[0], np.cumsum(widths[members])[:-1]])
        blocks.append((members, np.hstack(lefts[members]), np.vstack(rights[members]), offsets))
    gram = np.zeros((len(widths), len(widths)))
    for index, (mine, left, right, cuts) in enumerate(blocks):
        for theirs, other_left, other_right, other_cuts in blocks[: index + 1]:
            cells = (left.T @ other_left) * (right @ other_right.T)
            sums = np.add.reduceat(np.add.reduceat(cells, cuts, axis=0), other_cuts, axis=1)
            gram[mine, theirs] = sums
            gram[theirs, mine] = sums.T
    return gram


def _tensor_gram(key: str, changes: Sequence[Change]) -> Array:
    """Inner products of one named tensor's changes, a piece of all clients at a time."""
    gram = np.zeros((len(changes), len(changes)))
    step = max(1, _NUMBERS // len(changes))
    pairs = [(one.adapter.tensors[key].ravel(), one.start.tensors[key].ravel()) for one in changes]
    for first in range(0, len(pairs[0][0]), step):
        part = slice(first, first + step)
        vectors = np.stack([np.subtract(a[part], b[part], dtype=np.float64) for a, b in pairs])
        gram += vectors @ vectors.T
    return gram
