"""What every choice of a piece has: a name, and a form in which it is printed and read back.

>>> @dataclass(frozen=True)
... class Shrink(Piece):
...     kind = "shrink"
...     share: float = 0.5
...     hard: bool = False
>>> str(Shrink()), str(Shrink(0.1, hard=True))
('shrink', 'shrink(share=0.1, hard=true)')
>>> read_piece("shrink(share=1)", {"shrink": Shrink}, "example")
Shrink(share=1.0, hard=False)
>>> read_piece("shrink(shar=1)", {"shrink": Shrink}, "example")
Traceback (most recent call last):
aggregation.errors.RecipeError: example=shrink has no setting 'shar'; allowed: share, hard
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar

from aggregation.errors import RecipeError

_FORM = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\((.*)\))?\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """Base of all choices; a subclass is a frozen dataclass and sets :attr:`kind`.

    Attributes:
        kind: name of the choice, lower case with hyphens. Settings are the dataclass's fields, of
            type bool, int, float or str, each with a default; a ``float | None`` has default None.
    """

    kind: ClassVar[str]

    def __str__(self) -> str:
        said = [
            f"{f.name}={_written(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != _default(f)
        ]
        return f"{self.kind}({', '.join(said)})" if said else self.kind


@dataclass(frozen=True)
class Reduce(Piece):
    """Base of the reduces; a subclass says what holds for it.

    Each has an ``accumulator`` and a ``delta`` of its own: whether it adds up changes relative to
    each client's start, or whole updates.

    Attributes:
        linear: whether the server needs only sums of what clients send.
        weighted: whether it is the mean by the clients' weights, and no other one.
        mixed_ranks: whether clients may have other ranks and scales than the global adapter.
        counts_unchanged: whether a client that changed nothing still has a say.
        factors: whether it yields changes of B and of A (``Reduced.factors``); else products only.
        coordinate_wise: whether each coordinate of the factors is decided by itself, so that all
            clients must mean the same by it.
        robust: whether it withstands clients that lie, for which it must see each update alone,
            and a client has one vote.
        trusts: whether it needs the update of a client that the server trusts.
        reference: what the report's error is the distance from.
        silence: what it says if it leaves every update out and the adapter stays as it is.
    """

    linear: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    counts_unchanged: ClassVar[bool] = False
    factors: ClassVar[bool] = False
    coordinate_wise: ClassVar[bool] = False
    robust: ClassVar[bool] = False
    trusts: ClassVar[bool] = False
    reference: ClassVar[str] = "the exact mean"
    silence: ClassVar[str] = "no update counts for anything, so the adapter stays as it was"

    def needs(self, expected: int) -> str:
        """Why so few updates are too few, with the remedy; empty if they are enough.

        Args:
            expected: number of updates.
        """
        return ""


def read_piece(text: str, kinds: Mapping[str, type[Any]], where: str) -> Any:
    """A choice as it is written in a scenario: ``kind``, or ``kind(setting=value, ...)``.

    Args:
        text: what is written.
        kinds: the choices of this piece, by name.
        where: name of the piece, for messages.

    Raises:
        RecipeError: if the kind or a setting is unknown, or a value is of the wrong type; whatever
            the choice itself refuses.
    """
    match = _FORM.match(text)
    name = match[1] if match else text.strip()
    if match is None or name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"{where}={text!r} is unknown; {hint}allowed: {', '.join(sorted(kinds))}")
    kind = kinds[name]
    known = {f.name: f for f in fields(kind) if f.init}
    settings: dict[str, Any] = {}
    for part in (match[2] or "").split(","):
        if not part.strip():
            continue
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise RecipeError(f"{where}={name} has no setting {key!r}; allowed: {allowed}")
        if not equals:
            raise RecipeError(f"{where}={name}: {key} has no value; write {key}=...")
        settings[key] = _value(value, known[key], f"{where}={name}: {key}")
    return kind(**settings)


def _value(text: str, field: Field[Any], where: str) -> Any:
    default, annotation = _default(field), str(field.type)
    if default is None and text == "none":
        return None
    try:
        if "bool" in annotation:
            return {"true": True, "false": False}[text.lower()]
        if "float" in annotation:
            return float(text)
        if "int" in annotation:
            return int(text)
    except (KeyError, ValueError):
        raise RecipeError(f"{where}={text!r} is not a {annotation}") from None
    return text.strip("'\"")


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
