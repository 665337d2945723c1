"""The small pieces of a recipe that need no algebra: codec, weigh, private.

A piece is a frozen value; a recipe holds one of each kind. A further choice is a further class
here (or in reducing, refactoring, ...), listed in :mod:`aggregation.choices`.

    >>> str(Float32()), str(ByExamples()), str(NoPrivacy())
    ('float32', 'examples', 'none')
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregation.piece import Piece
from aggregation.spec import AdapterSpec
from aggregation.update import Update


@dataclass(frozen=True)
class Float32(Piece):
    """Codec: values travel as they are, 4 bytes each."""

    kind = "float32"

    def nbytes(self, spec: AdapterSpec) -> int:
        """Bytes of one adapter on the wire, without framing."""
        return 4 * spec.size


@dataclass(frozen=True)
class ByExamples(Piece):
    """Weigh: by the update's own weight, usually its number of examples (McMahan et al. 2017)."""

    kind = "examples"

    def weight(self, update: Update) -> float:
        """The weight in the mean, before normalising."""
        return update.weight


@dataclass(frozen=True)
class Uniform(Piece):
    """Weigh: every client the same."""

    kind = "uniform"

    def weight(self, update: Update) -> float:
        """1, whatever the client says."""
        return 1.0


@dataclass(frozen=True)
class NoPrivacy(Piece):
    """Private: nothing at the server; clients may train with example-level privacy on their own."""

    kind = "none"


Codec = Float32
Weigh = ByExamples | Uniform
Private = NoPrivacy
