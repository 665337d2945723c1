"""The small pieces of a recipe that need no algebra: train, codec, weigh, private.

A piece is a frozen value; a recipe holds one of each kind. A further choice is a further class
here (or in reducing, refactoring, ...), listed in :mod:`aggregation.recipe`.

    >>> str(Both()), str(Float32()), str(ByExamples()), str(NoPrivacy())
    ('both', 'float32', 'examples', 'none')
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregation.spec import AdapterSpec
from aggregation.update import Update


@dataclass(frozen=True)
class Both:
    """Train: clients train and send both factors of every module."""

    def __str__(self) -> str:
        return "both"


@dataclass(frozen=True)
class Float32:
    """Codec: values travel as they are, 4 bytes each."""

    def __str__(self) -> str:
        return "float32"

    def nbytes(self, spec: AdapterSpec) -> int:
        """Bytes of one adapter on the wire, without framing."""
        return 4 * spec.size


@dataclass(frozen=True)
class ByExamples:
    """Weigh: by the update's own weight, usually its number of examples (McMahan et al. 2017)."""

    def __str__(self) -> str:
        return "examples"

    def weight(self, update: Update) -> float:
        """The weight in the mean, before normalising."""
        return update.weight


@dataclass(frozen=True)
class Uniform:
    """Weigh: every client the same."""

    def __str__(self) -> str:
        return "uniform"

    def weight(self, update: Update) -> float:
        """1, whatever the client says."""
        return 1.0


@dataclass(frozen=True)
class NoPrivacy:
    """Private: nothing at the server; clients may train with example-level privacy on their own."""

    def __str__(self) -> str:
        return "none"


Train = Both
Codec = Float32
Weigh = ByExamples | Uniform
Private = NoPrivacy
