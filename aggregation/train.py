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

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from aggregation.errors import RecipeError
from aggregation.piece import Piece

FACTORS = ("both", "A", "B", "core")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one client does in one round.

    Attributes:
        trains: which factors move: ``both``, ``A``, ``B``, or ``core`` (the r x r matrix R of
            ``B R A``, with B and A frozen). Tensors outside the modules always train.
        sends: which factors go to the server, in the same words.

    Raises:
        RecipeError: if a value is not one of its words.
    """

    trains: str = "both"
    sends: str = "both"

    def __post_init__(self) -> None:
        for name in ("trains", "sends"):
            if getattr(self, name) not in FACTORS:
                raise RecipeError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(FACTORS)}"
                )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a message; what is at its default is left out."""
        default = Assignment()
        return {k: v for k, v in asdict(self).items() if v != getattr(default, k)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Assignment:
        """The inverse of :meth:`to_mapping`.

        Raises:
            RecipeError: on an unknown field, or a value of a wrong type or out of bounds.
        """
        known = {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise RecipeError(f"assignment has the unknown field {key!r}")
            if type(value) is not known[key]:
                raise RecipeError(f"assignment: {key}={value!r} must be {known[key].__name__}")
        return cls(**values)


class Train(Protocol):
    """A choice of the train piece."""

    @property
    def fixed_gauge(self) -> bool:
        """Whether what clients send has one meaning per coordinate: a part of it is frozen."""

    def assignment(self, number: int) -> Assignment:
        """What every client of this round (counted from 1) does."""


@dataclass(frozen=True)
class Both(Piece):
    """Train: clients train and send both factors of every module."""

    kind = "both"
    fixed_gauge = False

    def assignment(self, number: int) -> Assignment:
        """Both factors, in every round."""
        return Assignment()


@dataclass(frozen=True)
class OnlyB(Piece):
    """Train: A stays as it is handed out, B is trained and sent (FFA-LoRA, 2403.12313)."""

    kind = "only-b"
    fixed_gauge = True

    def assignment(self, number: int) -> Assignment:
        """B, in every round."""
        return Assignment(trains="B", sends="B")


@dataclass(frozen=True)
class Alternate(Piece):
    """Train: B in odd rounds, A in even ones, the other one frozen (RoLoRA, 2502.01755)."""

    kind = "alternate"
    fixed_gauge = True

    def assignment(self, number: int) -> Assignment:
        """B in odd rounds, A in even ones."""
        factor = "B" if number % 2 else "A"
        return Assignment(trains=factor, sends=factor)
