"""What the members of one secure sum agree on: who they are, their neighbours, the threshold.

    >>> session = Session.of("run-1", 1, [f"c{i}" for i in range(5)], length=10)
    >>> session.degree, session.threshold
    (4, 4)
    >>> session.neighbours("c0")
    ('c1', 'c2', 'c3', 'c4')

With few members everybody is everybody's neighbour (Bonawitz et al. 2017). With many, each has
``degree`` neighbours on a circle in random order (Bell et al. 2020, section 3), so that the work
of a client grows with the logarithm of their number only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from privacy.errors import PrivacyError

MAX_MEMBERS = 10_000
MAX_LENGTH = 1 << 28
COMPLETE_UP_TO = 128
SECURITY_BITS = 40
CORRECTNESS_BITS = 20


class SecureSumError(PrivacyError):
    """A message of the protocol that is malformed, or comes at the wrong time."""


class SecureSumAborted(SecureSumError):  # noqa: N818 - says what happened
    """The sum cannot be finished without giving something away, so it is not finished."""


@dataclass(frozen=True)
class Session:
    """One secure sum. Equal sessions have equal digests, to which every signature and key is bound.

    Attributes:
        run: name of the run.
        round: number of the round, from 1.
        members: stable names of the cohort, kept sorted; at least 3 (the sum of two tells each of
            them the other's vector).
        length: number of 4-byte values in a vector.
        degree: neighbours of each member; even, or everybody else.
        threshold: pieces that give a secret back, out of ``degree + 1``; above half of them.
        part: which sum of the round this is, where there are several.

    Raises:
        SecureSumError: if a number is out of its bounds.
    """

    run: str
    round: int
    members: tuple[str, ...]
    length: int
    degree: int
    threshold: int
    part: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(sorted(self.members)))
        count = len(self.members)
        if len(set(self.members)) != count or not 3 <= count <= MAX_MEMBERS:
            raise SecureSumError(
                f"a secure sum needs 3 to {MAX_MEMBERS} different members, got {count}: draw a "
                "larger cohort, or switch the secure sum off"
            )
        if not 1 <= self.length <= MAX_LENGTH:
            raise SecureSumError(f"length={self.length} is outside 1..{MAX_LENGTH}")
        complete = self.degree == count - 1
        if not (complete or (2 <= self.degree < count - 1 and self.degree % 2 == 0)):
            raise SecureSumError(
                f"degree={self.degree} must be even and below {count - 1}, or {count - 1}"
            )
        if not (self.degree + 1) / 2 < self.threshold <= self.degree + 1:
            raise SecureSumError(
                f"threshold={self.threshold} must be above half of {self.degree + 1} and at most "
                "that: otherwise two halves of the members could unmask two different sums"
            )

    @classmethod
    def of(
        cls,
        run: str,
        number: int,
        members: Sequence[str],
        *,
        length: int,
        dropouts: float = 0.3,
        corrupt: float = 0.1,
        part: int = 0,
    ) -> Session:
        """A session with the smallest sufficient degree.

        Args:
            run: name of the run.
            number: of the round.
            members: the cohort.
            length: number of values in a vector.
            dropouts: share of the members that may drop out at any phase.
            corrupt: share of the members that may be in league with the server.
            part: which sum of the round.
        """
        degree, threshold = choose(len(members), dropouts, corrupt)
        return cls(run, number, tuple(members), length, degree, threshold, part)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes over every field."""
        document = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"airpeft secure sum 1\0" + document.encode()).digest()

    @cached_property
    def _circle(self) -> tuple[str, ...]:
        # In the order of hashes over everything agreed on: random, and the same for everybody.
        def place(member: str) -> bytes:
            return hashlib.sha256(self.digest + member.encode()).digest()

        return tuple(sorted(self.members, key=place))

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {member: place for place, member in enumerate(self._circle)}

    def neighbours(self, member: str) -> tuple[str, ...]:
        """Those with whom a member shares masks and pieces, sorted.

        Raises:
            SecureSumError: if it is none of the members.
        """
        if member not in self._places:
            raise SecureSumError(f"{member} is not a member of this secure sum")
        count, place = len(self.members), self._places[member]
        if self.degree == count - 1:
            return tuple(name for name in self.members if name != member)
        steps = range(1, self.degree // 2 + 1)
        found = {self._circle[(place + step) % count] for step in steps}
        found |= {self._circle[(place - step) % count] for step in steps}
        return tuple(sorted(found))

    def holders(self, member: str) -> dict[str, int]:
        """Who holds a piece of a member's secrets, and the number of that piece (from 1)."""
        everybody = sorted((member, *self.neighbours(member)))
        return {holder: number for number, holder in enumerate(everybody, start=1)}

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a message."""
        return {**asdict(self), "members": list(self.members)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Session:
        """The inverse of :meth:`to_mapping`.

        Raises:
            SecureSumError: on a field missing, unknown, of a wrong type or out of bounds.
        """
        kinds = {
            "run": str, "round": int, "members": list, "length": int, "degree": int,
            "threshold": int, "part": int,
        }  # fmt: skip
        right = set(values) == set(kinds)
        if not right or any(type(values[k]) is not kind for k, kind in kinds.items()):
            raise SecureSumError(f"a session has exactly the fields {', '.join(kinds)}")
        if any(not isinstance(name, str) for name in values["members"]):
            raise SecureSumError("the members of a session are names")
        return cls(**{**values, "members": tuple(values["members"])})


def choose(count: int, dropouts: float = 0.3, corrupt: float = 0.1) -> tuple[int, int]:
    """The smallest degree, and a threshold, that are safe and live (Bell et al. 2020, section 3.2).

    The neighbours of a member are a random subset, so these are tails of the hypergeometric
    distribution. Safe: except with probability 2^-40, no member has as many corrupt holders as the
    threshold, and the honest survivors stay connected on the circle. Live: except with probability
    2^-20, every member keeps enough holders.

    Up to 128 members, or where no smaller degree will do, everybody is everybody's neighbour, with
    the threshold just above two thirds: then a lying server cannot unmask two different sums unless
    a third of the members help it (Bonawitz et al. 2017, section 6.2). With fewer neighbours the
    threshold is just above half, which is enough against a server that does not lie.

    Args:
        count: number of members.
        dropouts: share that may drop out.
        corrupt: share that may be in league with the server.

    Returns:
        (degree, threshold).

    Raises:
        SecureSumError: if the shares leave nobody.
    """
    if not (0 <= dropouts < 1 / 3 and 0 <= corrupt < 1 / 3):
        raise SecureSumError(
            f"dropouts={dropouts} and corrupt={corrupt} must each lie in 0..1/3: beyond that the "
            "sum cannot be both safe and finished"
        )
    complete = (count - 1, min(count, 2 * count // 3 + 1))
    gone, bad = math.ceil(dropouts * count), math.ceil(corrupt * count)
    if count <= COMPLETE_UP_TO:
        return complete
    for degree in range(16, count - 1, 2):
        # Disconnecting a circle takes a run of degree / 2 neighbours that are gone or corrupt.
        run = math.log2(count) + (degree / 2) * math.log2(max(1e-9, (gone + bad) / count))
        if run > -SECURITY_BITS:
            continue
        threshold = (degree + 1) // 2 + 1
        unsafe = _tail(count - 1, bad, degree, threshold)
        dead = _tail(count - 1, gone, degree, degree + 1 - threshold + 1)
        if count * unsafe <= 2.0**-SECURITY_BITS and count * dead <= 2.0**-CORRECTNESS_BITS:
            return degree, threshold
    return complete


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """Probability that a draw without replacement has at least so many marked ones."""
    total = math.comb(population, drawn)
    ways = sum(
        math.comb(marked, k) * math.comb(population - marked, drawn - k)
        for k in range(max(0, least), min(marked, drawn) + 1)
    )
    return ways / total
