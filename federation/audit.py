"""The audit log as a chain: each line carries a digest over itself and the digest before it.

Whoever changes, removes or inserts a line breaks the chain from there on; whoever cuts the end off
must be caught by a head that was noted elsewhere (``airpeft audit verify --head DIGEST``).

    >>> first = digest_of(GENESIS, 1, 0.0, "ann", "start", "r-1", "spring")
    >>> verify([Line(1, 0.0, "ann", "start", "r-1", "spring", first)]).sound
    True
    >>> verify([Line(1, 0.0, "ben", "start", "r-1", "spring", first)]).broken_at
    1
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

GENESIS = "0" * 64


class Line(NamedTuple):
    """One line: who did what to what, when (Unix seconds) and why."""

    number: int
    at: float
    who: str
    action: str
    subject: str
    why: str
    digest: str


class Verdict(NamedTuple):
    """What a look at the whole chain gave.

    Attributes:
        lines: how many were read.
        head: digest of the last sound one.
        broken_at: number of the first line that does not follow from those before; None if none.
        seen: whether the head that was asked for is among the sound ones; True if none was.
    """

    lines: int
    head: str
    broken_at: int | None
    seen: bool

    @property
    def sound(self) -> bool:
        """Whether nothing was changed, removed or put in."""
        return self.broken_at is None and self.seen


def digest_of(
    previous: str, number: int, at: float, who: str, action: str, subject: str, why: str
) -> str:
    """SHA-256 over the digest before and the line, as hex."""
    line = json.dumps([previous, number, float(at), who, action, subject, why])
    return hashlib.sha256(line.encode()).hexdigest()


def verify(lines: Iterable[Line], head: str | None = None) -> Verdict:
    """Follow the chain from its first line.

    Args:
        lines: all of them, oldest first.
        head: a digest that was noted at some time and must still be there; None: none was.
    """
    previous, count, seen = GENESIS, 0, head in (None, GENESIS)
    for line in lines:
        expected = digest_of(previous, *line[:-1])
        if line.number != count + 1 or line.digest != expected:
            return Verdict(count, previous, line.number, seen)
        previous, count = line.digest, count + 1
        seen = seen or previous == head
    return Verdict(count, previous, None, seen)
