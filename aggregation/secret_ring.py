"""Numbers and weights as whole numbers modulo a power of two: one client's, and the sum of many.

Values are those of :class:`aggregation.ring.FixedPoint`: rounded once on the client, added exactly.
Weights are fractions of ``max_weight`` of 30 bits, in as many digits as the ring needs for that, so
that they are right with few bits too. The mean of K clients of weight W together is off by at most
:meth:`Ring.bound` in each value: ``K LSB / (2 W)``, and what rounding W does to the mean.

    >>> ring = Ring(clip=0.5, clients=10, max_weight=100.0)
    >>> one = ring.numbers(np.array([0.25]), 40.0), ring.weights(np.array([40.0]))
    >>> other = ring.numbers(np.array([0.0]), 60.0), ring.weights(np.array([60.0]))
    >>> total = ring.sums(one[0] + other[0], 2)
    >>> weight = ring.weight_sums(one[1] + other[1], 2)
    >>> round(float(total[0]), 6), round(float(weight[0]), 6)
    (10.0, 100.0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregation.errors import AggregationError, RecipeError
from aggregation.low_rank import Array
from aggregation.ring import FixedPoint, Numbers, RingError

WIDER = 8.0  # the range of sketches, over that of values
_ONE = 1 << 30  # a whole weight


class SecretError(AggregationError):
    """A sum, or what is to enter one, that does not fit what was agreed on."""


@dataclass(frozen=True)
class Ring:
    """How numbers enter a secure sum: public, the same for all clients of a round.

    Attributes:
        clip: no change of a value may be larger in absolute value.
        clients: the most clients whose numbers are added.
        max_weight: the largest weight of a client.
        bits: 32, 24 or 16; a number costs an eighth of it in bytes.
        equal: whether all clients weigh the same, so that no weight travels.
        by_index: whether the weight of every rank index is added up.
        norm: if above 0, each client scales its vector down to this Euclidean norm, and rounds
            towards zero, so that rounding makes it no longer.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    clip: float
    clients: int
    max_weight: float = 1.0
    bits: int = 32
    equal: bool = False
    by_index: bool = False
    norm: float = 0.0

    def __post_init__(self) -> None:
        FixedPoint(WIDER * self.clip, self.clients, self.max_weight, self.bits)
        if not (math.isfinite(self.norm) and 0 <= self.norm <= 1e12):
            raise RecipeError(f"secure-sum: norm={self.norm:g} is not in 0..1e12")

    @cached_property
    def _values(self) -> FixedPoint:
        return FixedPoint(self.clip, self.clients, self.max_weight, self.bits)

    @cached_property
    def wide(self) -> Ring:
        """The ring of sketches."""
        return replace(self, clip=WIDER * self.clip)

    @property
    def lsb(self) -> float:
        """What one unit means, in weight times value."""
        return self._values.lsb

    def bound(self, clients: int, weight: float) -> float:
        """How far each value of a mean can be from the exact one, at most.

        Args:
            clients: how many were added.
            weight: what they weigh together.
        """
        rounded = 2.0 if self.norm else 1.0  # towards zero it is up to a whole unit
        weights = 0.0 if self.equal else clients * self.max_weight / _ONE
        return (clients * self.lsb * rounded / 2.0 + weights * self.clip) / weight

    @property
    def digits(self) -> int:
        """How many numbers a weight takes."""
        return math.ceil(31 / math.log2(self._values.levels + 1))

    def numbers(self, vector: npt.NDArray[np.floating], weight: float = 1.0) -> Numbers:
        """A client's values times its weight, as ring elements.

        Raises:
            RingError: if a value or the weight is out of its range.
            CodecError: if a value is not finite.
        """
        found = np.asarray(vector, np.float64)
        beyond = int(np.count_nonzero(np.abs(found) > np.float32(self.clip)))
        if beyond:
            raise RingError(
                f"secure sum: {beyond} of {found.size} values lie beyond clip={self.clip:g} (the "
                f"largest is {float(np.abs(found).max()):.3g}); raise the clip of private="
                "secure-sum for all clients, or lower the learning rate"
            )
        if self.norm:
            found = np.trunc(found / self.lsb) * self.lsb
        return self._values.numbers(found, weight)  # type: ignore[arg-type]  # more precise

    def weights(self, weights: Array) -> Numbers:
        """Weights, each 0 or more, as ring elements: all lowest digits first, then the next.

        Raises:
            RingError: if one is out of range.
        """
        if not np.all((weights >= 0) & (weights <= self.max_weight)):
            raise RingError(
                f"a weight of {float(np.max(weights)):g} is not in 0..{self.max_weight:g}; raise "
                "max_weight for all clients"
            )
        left = np.rint(weights / self.max_weight * _ONE).astype(np.int64)
        out = []
        for _ in range(self.digits):
            left, digit = np.divmod(left, self._values.levels + 1)
            out.append(digit.astype(np.uint32))
        return np.concatenate(out)

    def sums(self, numbers: Numbers, clients: int) -> Array:
        """The sum of weight times value.

        Raises:
            RingError: if it is larger than so many clients can make it.
        """
        return self._values.total(numbers, clients)

    def weight_sums(self, numbers: Numbers, clients: int) -> Array:
        """The sums of weights: the inverse of :meth:`weights`, digit by digit.

        Raises:
            RingError: if one is larger than so many clients can make it, or negative.
        """
        digits = self.sums(numbers, clients) / self.lsb
        total = np.zeros(numbers.size // self.digits)
        for place, digit in enumerate(np.split(np.rint(digits), self.digits)):
            total += digit * float(self._values.levels + 1) ** place
        if np.any(total < 0) or np.any(total > clients * _ONE):
            raise RingError(f"{clients} clients cannot have the weight that came; the sum is void")
        return total * (self.max_weight / _ONE)

    def to_bytes(self, numbers: Numbers) -> bytes:
        """Ring elements, masked or not: their low ``bits`` bits."""
        return self._values.to_bytes(numbers)

    def from_bytes(self, data: bytes, length: int) -> Numbers:
        """The inverse of :meth:`to_bytes`, modulo 2^bits.

        Raises:
            CodecError: if the length is another.
        """
        return self._values.from_bytes(data, length)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a message."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Ring:
        """The inverse of :meth:`to_mapping`.

        Raises:
            SecretError: on a field missing, unknown or of a wrong type.
            RecipeError: if a number is out of its bounds.
        """
        named: dict[str, type] = {"float": float, "int": int, "bool": bool}
        kinds = {f.name: named[str(f.type)] for f in fields(cls)}
        if set(values) != set(kinds) or any(type(values[k]) is not kinds[k] for k in kinds):
            raise SecretError(f"a ring has exactly the fields {', '.join(sorted(kinds))}")
        return cls(**values)
