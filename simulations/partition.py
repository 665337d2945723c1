"""Which client gets which rows: the shapes of skew that federated learning is tried on.

A split is made from labels alone (and a column of group names, for the natural one), is the same
for the same seed on every machine, uses ALL rows exactly once, and leaves no client with fewer
rows than asked. The held-out rows are taken first, in the proportions of the classes.

    >>> import numpy as np
    >>> labels = np.array([0, 1] * 50)
    >>> split = make_split(labels, Dirichlet(alpha=0.5), clients=4, heldout=0.2, minimum=5, seed=1)
    >>> len(split.heldout), sum(len(rows) for rows in split.clients)
    (20, 80)
    >>> min(len(rows) for rows in split.clients) >= 5
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulations.datasets import DatasetError

IntArray = npt.NDArray[np.int64]
_HELDOUT, _CLIENTS, _LIMIT = 1, 2, 3  # each draw has a stream of its own


class PartitionError(DatasetError):
    """The rows can't be split as asked; says which number to change."""


@dataclass(frozen=True)
class Iid:
    """Every client sees the same mixture, in equal shares."""


@dataclass(frozen=True)
class Dirichlet:
    """Each class is dealt out in shares drawn from Dirichlet(alpha) (Hsu et al. 2019, section 3).

    Small alpha: few classes and very different sizes; large alpha: close to :class:`Iid`.
    """

    alpha: float


@dataclass(frozen=True)
class Pathological:
    """Rows sorted by class, cut into equal shards; each client gets so many of them.

    McMahan et al. 2017, section 3.
    """

    classes: int


@dataclass(frozen=True)
class Natural:
    """One group of rows, or several whole ones, for each client; group numbers by row."""

    groups: IntArray


@dataclass(frozen=True)
class SizeSkewed:
    """The same mixture, but sizes that fall as rank to the power of ``-exponent`` (Zipf)."""

    exponent: float


Scheme = Iid | Dirichlet | Pathological | Natural | SizeSkewed


@dataclass(frozen=True)
class Split:
    """Row numbers by client, and those that no client has.

    Attributes:
        clients: for each client, its rows in ascending order.
        heldout: rows to measure the global adapter on.
    """

    clients: tuple[IntArray, ...]
    heldout: IntArray


def make_split(
    labels: IntArray,
    scheme: Scheme,
    *,
    clients: int,
    heldout: float,
    minimum: int,
    seed: int,
    limit: int = 0,
) -> Split:
    """Split rows among clients.

    Args:
        labels: class of each row, (n,).
        scheme: the shape of the skew.
        clients: how many clients.
        heldout: share of the rows that no client gets, 0 to below 1.
        minimum: fewest rows of any client.
        seed: the same seed gives the same split.
        limit: use only so many rows, drawn in the proportions of the classes; 0 for all.

    Raises:
        PartitionError: if there are too few rows or too few groups.
    """
    rows = np.arange(len(labels), dtype=np.int64)
    if limit and limit < len(rows):
        rows = _stratified(rows, labels, limit, _rng(seed, _LIMIT))
    kept_out = _stratified(rows, labels, round(heldout * len(rows)), _rng(seed, _HELDOUT))
    rows = np.setdiff1d(rows, kept_out, assume_unique=True)
    if clients < 1:
        raise PartitionError(f"clients={clients}: at least one is needed")
    if len(rows) < clients * max(1, minimum):
        raise PartitionError(
            f"{len(rows)} training rows cannot give {clients} clients {minimum} rows each: "
            f"use at most {len(rows) // max(1, minimum)} clients or a smaller minimum"
        )
    rng = _rng(seed, _CLIENTS)
    match scheme:
        case Iid():
            parts = np.array_split(rng.permutation(rows), clients)
        case Dirichlet(alpha):
            parts = _dirichlet(rows, labels, clients, alpha, rng)
        case Pathological(classes):
            parts = _pathological(rows, labels, clients, classes, rng)
        case SizeSkewed(exponent):
            parts = _size_skewed(rows, clients, exponent, rng)
        case Natural(groups):
            # Whole groups are the point of the natural split: too small a client is an error.
            return _checked(_natural(rows, groups, clients), kept_out, minimum)
    return _checked(_top_up(parts, max(1, minimum), rng), kept_out, minimum)


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))


def _stratified(rows: IntArray, labels: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    """``count`` of the rows, each class in its proportion, largest remainders first."""
    classes, sizes = np.unique(labels[rows], return_counts=True)
    exact = sizes * (count / max(1, len(rows)))
    take = np.floor(exact).astype(int)
    order = np.argsort(-(exact - take), kind="stable")
    take[order[: count - int(take.sum())]] += 1
    chosen = [
        rng.permutation(rows[labels[rows] == c])[:k] for c, k in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def _dirichlet(
    rows: IntArray, labels: IntArray, clients: int, alpha: float, rng: np.random.Generator
) -> list[IntArray]:
    parts: list[list[IntArray]] = [[] for _ in range(clients)]
    for label in np.unique(labels[rows]):
        own = rng.permutation(rows[labels[rows] == label])
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(own)).astype(int)
        for part, piece in zip(parts, np.split(own, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _pathological(
    rows: IntArray, labels: IntArray, clients: int, classes: int, rng: np.random.Generator
) -> list[IntArray]:
    shuffled = rng.permutation(rows)
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(ordered, clients * classes)
    dealt = rng.permutation(len(shards)).reshape(clients, classes)
    return [np.concatenate([shards[i] for i in own]) for own in dealt]


def _size_skewed(
    rows: IntArray, clients: int, exponent: float, rng: np.random.Generator
) -> list[IntArray]:
    shares = np.arange(1, clients + 1, dtype=float) ** -exponent
    cuts = np.round(np.cumsum(shares / shares.sum())[:-1] * len(rows)).astype(int)
    return list(np.split(rng.permutation(rows), cuts))


def _natural(rows: IntArray, groups: IntArray, clients: int) -> list[IntArray]:
    """Largest group first, each to the client that has fewest rows so far."""
    names, sizes = np.unique(groups[rows], return_counts=True)
    if len(names) < clients:
        raise PartitionError(
            f"the column has {len(names)} groups, too few for {clients} clients: "
            f"use at most {len(names)} clients, or another scheme"
        )
    parts: list[list[IntArray]] = [[] for _ in range(clients)]
    filled = np.zeros(clients, dtype=int)
    for index in np.argsort(-sizes, kind="stable"):
        client = int(np.argmin(filled))
        parts[client].append(rows[groups[rows] == names[index]])
        filled[client] += sizes[index]
    return [np.concatenate(part) for part in parts]


def _top_up(parts: Sequence[IntArray], minimum: int, rng: np.random.Generator) -> list[IntArray]:
    """Move rows from the largest client to each that has fewer than ``minimum``."""
    out = list(parts)
    for client in range(len(out)):
        while len(out[client]) < minimum:
            donor = max(range(len(out)), key=lambda i: (len(out[i]), -i))
            spare = min(minimum - len(out[client]), max(1, len(out[donor]) - minimum))
            moved = rng.permutation(out[donor])
            out[client] = np.concatenate([out[client], moved[:spare]])
            out[donor] = moved[spare:]
    return out


def _checked(parts: Sequence[IntArray], kept_out: IntArray, minimum: int) -> Split:
    for client, part in enumerate(parts):
        if len(part) < max(1, minimum):
            raise PartitionError(
                f"client {client} would have {len(part)} rows, fewer than the minimum of "
                f"{max(1, minimum)}: use fewer clients or a smaller minimum"
            )
    return Split(tuple(np.sort(part) for part in parts), kept_out)
