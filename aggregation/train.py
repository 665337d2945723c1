"""The train piece: which tensors a client trains, sends and keeps in one round.

A choice says it per round, as an :class:`Assignment`, which travels with the task as plain values.

    >>> Alternate().assignment(1).trains, Alternate().assignment(2).trains
    ('B', 'A')
    >>> Assignment.from_mapping(OnlyB().assignment(3).to_mapping()) == OnlyB().assignment(3)
    True

Whatever a client does not send is, at the server, what that client started from: every update is a
whole adapter, and the other pieces need not know who trained what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from aggregation.assignment import MAX_SEED, Assignment, whole, within
from aggregation.errors import RecipeError
from aggregation.piece import Piece

__all__ = [
    "Aligned",
    "Alternate",
    "AlternateSelect",
    "Assignment",
    "Both",
    "Core",
    "OnlyB",
    "Overlay",
    "RandomRanks",
    "ShareA",
    "Train",
]


class Train(Protocol):
    """A choice of the train piece."""

    @property
    def fixed_gauge(self) -> bool:
        """Whether what clients send has one meaning per coordinate: a part of it is frozen."""

    @property
    def personal(self) -> bool:
        """Whether a part of the model never leaves its client, so that each has its own."""

    @property
    def up(self) -> str:
        """Numbers per module that a client sends in a round; D is d_out + d_in."""

    @property
    def down(self) -> str:
        """Numbers per module that a client needs from the server in a round."""

    def assignment(self, number: int) -> Assignment:
        """What every client of this round (counted from 1) does."""


@dataclass(frozen=True)
class Both(Piece):
    """Train: clients train and send both factors of every module."""

    kind = "both"
    fixed_gauge = False
    personal = False
    up = "r D"
    down = "r D"

    def assignment(self, number: int) -> Assignment:
        """Both factors, in every round."""
        return Assignment()


@dataclass(frozen=True)
class OnlyB(Piece):
    """Train: A stays as it is handed out, B is trained and sent (FFA-LoRA, 2403.12313, eq. 7)."""

    kind = "only-b"
    fixed_gauge = True
    personal = False
    up = "r d_out"
    down = "r d_out"

    def assignment(self, number: int) -> Assignment:
        """B, in every round."""
        return Assignment(trains="B", sends="B")


@dataclass(frozen=True)
class Alternate(Piece):
    """Train: B in odd rounds, A in even ones, the other one frozen (RoLoRA, 2502.01755, alg. 1)."""

    kind = "alternate"
    fixed_gauge = True
    personal = False
    up = "r D / 2"
    down = "r D / 2"

    def assignment(self, number: int) -> Assignment:
        """B in odd rounds, A in even ones."""
        factor = _factor(number)
        return Assignment(trains=factor, sends=factor)


@dataclass(frozen=True)
class AlternateSelect(Piece):
    """Train: as :class:`Alternate`, and each client sends only its most important rank indices.

    LoRA-A2 (2410.22815): index j of a module counts ``||dB_j|| ||A_j||``, the norm of the change
    that it makes to the product (in rounds that train A, ``||B_j|| ||dA_j||``); the largest ones
    over all modules are sent, the others go back to where they started. A client without a share
    of its own sends the same share as all others.

    Attributes:
        share: share of the rank indices, over all modules, that are sent; above 0, at most 1.
    """

    kind = "alternate-select"
    fixed_gauge = True
    personal = False
    up = "share r D / 2"
    down = "r D / 2"
    share: float = 0.5

    def __post_init__(self) -> None:
        _share(self.kind, self.share)

    def assignment(self, number: int) -> Assignment:
        """B in odd rounds, A in even ones, by importance."""
        factor = _factor(number)
        return Assignment(trains=factor, sends=factor, select="importance", share=self.share)


@dataclass(frozen=True)
class RandomRanks(Piece):
    """Train: a random share of the rank indices, both factors; the others stay frozen but active.

    Fed-PLoRA (2602.16936) folds the indices that do not train into the client's frozen weights;
    here they stay where they are in the adapter and do not move, which is the same function, the
    same gradient, and leaves the shared base untouched.

    Attributes:
        share: share of the rank indices, over all modules, that train; above 0, at most 1.
        seed: public seed of the choice, which also depends on client and round.
    """

    kind = "random-ranks"
    fixed_gauge = False
    personal = False
    up = "share r D"
    down = "r D"
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _share(self.kind, self.share)
        whole("seed", self.seed, 0, MAX_SEED, self.kind)

    def assignment(self, number: int) -> Assignment:
        """Both factors of the indices that the client draws from the seed."""
        return Assignment(select="random", share=self.share, seed=self.seed)


@dataclass(frozen=True)
class Core(Piece):
    """Train: only the r x r matrix R of ``B R A``, B and A orthonormal from a public seed.

    Fed-SB (2502.15436): the mean of the R is the R of the mean, exactly. There the basis comes from
    the first gradient on somebody's data, which that somebody has to be willing to show; here it
    depends on no data at all, see :mod:`aggregation.core_basis`.

    Attributes:
        seed: public seed of the basis.
    """

    kind = "core"
    fixed_gauge = True
    personal = False
    up = "r^2"
    down = "r^2"
    seed: int = 0

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, MAX_SEED, self.kind)

    def assignment(self, number: int) -> Assignment:
        """The core, in every round."""
        return Assignment(trains="core", sends="core", seed=self.seed)


@dataclass(frozen=True)
class Aligned(Piece):
    """Train: both factors, rotated before sending towards those that were handed out.

    FedRot-LoRA (2602.23638): a rotation changes no product, but clients whose factors point the
    same way have a mean with less error. Towards A in odd rounds and B in even ones, as there.

    Attributes:
        softness: the paper's lambda, of the whole rotation; above 0, at most 1 (0.4 to 0.6 there).
    """

    kind = "aligned"
    fixed_gauge = False
    personal = False
    up = "r D"
    down = "r D"
    softness: float = 0.5

    def __post_init__(self) -> None:
        within("softness", self.softness, 0, 1, self.kind)
        if not self.softness:
            raise RecipeError(f"{self.kind}: softness=0 rotates nothing; choose train=both")

    def assignment(self, number: int) -> Assignment:
        """Both factors; towards A in odd rounds, B in even ones."""
        return Assignment(align=self.softness, align_to="A" if number % 2 else "B")


@dataclass(frozen=True)
class ShareA(Piece):
    """Train: both factors and the head; A is sent, B and the head stay on the client.

    FedSA-LoRA (2410.01463), eq. 4: what is common is learned by A. There is no global model: every
    client has its own, and one that is new starts with the B and head that are handed out. With
    privacy all of it trains privately: the gradients of A, which is sent, depend on B.
    """

    kind = "share-a"
    fixed_gauge = False
    personal = True
    up = "r d_in"
    down = "r d_in"

    def assignment(self, number: int) -> Assignment:
        """Both train, A is sent, in every round."""
        return Assignment(sends="A", keeps="B")


@dataclass(frozen=True)
class Overlay(Piece):
    """Train: both factors, and after them a second adapter that never leaves the client.

    FedDPA (2403.19211), its variant with local fine-tuning after the shared one (-F trains it once
    at the end, -T in every round, as here). How the two are mixed is in ``clients.overlay``.

    Attributes:
        mix: weight of the client's own adapter, 0 to 1 (0.5 in the paper).
    """

    kind = "overlay"
    fixed_gauge = False
    personal = True
    up = "r D"
    down = "r D"
    mix: float = 0.5

    def __post_init__(self) -> None:
        within("mix", self.mix, 0, 1, self.kind)

    def assignment(self, number: int) -> Assignment:
        """Both factors are sent, in every round; the overlay stays."""
        return Assignment(keeps="overlay", mix=self.mix)


def _factor(number: int) -> str:
    """The factor that moves in a round, counted from 1."""
    return "B" if number % 2 else "A"


def _share(kind: str, share: float) -> None:
    if not 0 < share <= 1:
        raise RecipeError(f"{kind}: share={share} must be above 0 and at most 1")
