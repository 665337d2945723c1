"""What one client does in one round, as plain values that travel with the task.

>>> Assignment(trains="B", sends="B").to_mapping()
{'trains': 'B', 'sends': 'B'}
>>> Assignment(trains="B", sends="A")
Traceback (most recent call last):
...
aggregation.errors.RecipeError: assignment: sends='A' is not trained (trains='B'); ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from aggregation.errors import RecipeError

FACTORS = ("both", "A", "B", "core")
SELECTIONS = ("", "random", "importance")
KEPT = ("", "B", "overlay")
MAX_SEED = (1 << 63) - 1
MAX_WIDTH = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one client does in one round. The defaults say: train and send both factors.

    Attributes:
        trains: which factors move: ``both``, ``A``, ``B``, or ``core`` (the r x r matrix R of
            ``B R A``, with B and A from a public seed). Tensors outside the modules always train.
        sends: which factors go to the server, in the same words; all of them must train. Tensors
            outside the modules go too, unless ``keeps`` is ``B``.
        align: softness of the rotation towards the start before sending, 0 (none) to 1 (the
            whole rotation), see :mod:`aggregation.aligning`.
        align_to: the factor of the start that is rotated towards, ``A`` or ``B``; with ``align``.
        select: how the rank indices that move are chosen: not at all, ``random`` before training
            from ``seed``, or by ``importance`` after it.
        share: share of the rank indices, over all modules, that are chosen; above 0, at most 1.
        keeps: what stays on the device from round to round and never leaves it: nothing, ``B``
            (with the tensors outside the modules), or an ``overlay`` (a second adapter).
        mix: weight of the overlay, 0 to 1.
        sketch: width of the sketch that goes to the server in place of the factors; 0 for none.
        noise_multiplier: standard deviation of the noise added to each factor, over ``clip``.
        clip: Frobenius norm to which each factor is clipped before the noise; 0 for neither.
        seed: PUBLIC randomness, the same for all clients: core basis, sketch, random ranks.
        holdout: share of the client's own examples that never train, 0 to 0.9.

    Raises:
        RecipeError: if a value is out of its bounds, or two contradict each other.
    """

    trains: str = "both"
    sends: str = "both"
    align: float = 0.0
    align_to: str = ""
    select: str = ""
    share: float = 1.0
    keeps: str = ""
    mix: float = 0.5
    sketch: int = 0
    noise_multiplier: float = 0.0
    clip: float = 0.0
    seed: int = 0
    holdout: float = 0.0

    def __post_init__(self) -> None:
        for name, words in (
            ("trains", FACTORS),
            ("sends", FACTORS),
            ("align_to", ("", "A", "B")),
            ("select", SELECTIONS),
            ("keeps", KEPT),
        ):
            if getattr(self, name) not in words:
                allowed = ", ".join(word or "'' (none)" for word in words)
                raise RecipeError(f"assignment: {name}={getattr(self, name)!r} is not {allowed}")
        within("align", self.align, 0, 1)
        within("mix", self.mix, 0, 1)
        within("holdout", self.holdout, 0, 0.9)
        within("noise_multiplier", self.noise_multiplier, 0, 1e6)
        within("clip", self.clip, 0, 1e6)
        if not 0 < self.share <= 1:
            raise RecipeError(f"assignment: share={self.share} must be above 0 and at most 1")
        whole("sketch", self.sketch, 0, MAX_WIDTH)
        whole("seed", self.seed, 0, MAX_SEED)
        objection = self._objection()
        if objection:
            raise RecipeError(f"assignment: {objection}")

    def _objection(self) -> str:
        """Why two fields contradict each other, or nothing."""
        if self.sends != self.trains and (self.trains != "both" or self.sends == "core"):
            return (
                f"sends={self.sends!r} is not trained (trains={self.trains!r}); "
                "send what trains, or train both"
            )
        if bool(self.align) != bool(self.align_to):
            return (
                f"align={self.align} and align_to={self.align_to!r} belong together; "
                "give both, or neither"
            )
        if self.align and (self.trains, self.sends) != ("both", "both"):
            return "align turns both factors, so trains and sends must be 'both'"
        if self.select and self.trains == "core":
            return "select chooses rank indices, and a core has none of its own; choose select=''"
        if self.share < 1 and not self.select:
            return f"share={self.share} needs select, 'random' or 'importance'"
        if self.keeps == "B" and self.sends != "A":
            return f"keeps='B' needs sends='A', not {self.sends!r}: what is kept is never sent"
        if self.noise_multiplier and not self.clip:
            return "noise_multiplier needs clip: noise protects only what is bounded"
        if self.clip and (self.trains, self.sends, self.select) != ("both", "both", ""):
            return "clip bounds both whole factors, so trains and sends must be 'both', select ''"
        if self.sketch and (self.sends not in ("both", "B") or self.keeps == "B" or self.select):
            return "sketch sends the whole product: sends must be 'both' or 'B', select ''"
        return ""

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a message; what is at its default is left out."""
        default = Assignment()
        return {k: v for k, v in asdict(self).items() if v != getattr(default, k)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Assignment:
        """The inverse of :meth:`to_mapping`; whole numbers may stand for fractions.

        Raises:
            RecipeError: on an unknown field, or a value of a wrong type or out of bounds.
        """
        known = {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise RecipeError(
                    f"assignment has the unknown field {key!r}; allowed: {', '.join(known)}"
                )
            kind = known[key]
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise RecipeError(f"assignment: {key}={value!r} must be {kind.__name__}")
            clean[key] = kind(value)
        return cls(**clean)


def within(name: str, value: float, least: float, most: float, what: str = "assignment") -> None:
    """Refuse a number outside its bounds, bounds included.

    Raises:
        RecipeError: naming the field and the bounds.
    """
    if not (math.isfinite(value) and least <= value <= most):
        raise RecipeError(f"{what}: {name}={value} must lie in {least:g}..{most:g}")


def whole(name: str, value: int, least: int, most: int, what: str = "assignment") -> None:
    """Refuse what is not a whole number within its bounds, bounds included.

    Raises:
        RecipeError: naming the field and the bounds.
    """
    if type(value) is not int or not least <= value <= most:
        raise RecipeError(f"{what}: {name}={value!r} must be a whole number in {least}..{most}")
