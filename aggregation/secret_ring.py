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
from aggregation.ring import MAX_CLIENTS, FixedPoint, Numbers, RingError

WIDER = 8.0  # the range of sketches, over that of values
LEAST_SHARE = 4  # steps of a client's own noise: with fewer, a sum of shares is no good Gaussian
# Standard deviations of noise that the ring has room for. Sums of discrete Gaussians are
# sub-Gaussian, so one of 2^28 values passes it once in 10^13 rounds, and then wraps around.
TAILS = 10.0
_ONE = 1 << 30  # a whole weight
_OF_NOISE: Mapping[str, int | float] = {"noise": 0.0, "least": 0, "honest": 0}


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
        noise: if above 0, each client adds noise of its own, see :attr:`share`; of ``honest``
            clients together it has this many times ``norm`` as its standard deviation.
        least: with noise: with fewer clients in it, a sum is given up, and nothing is unmasked.
        honest: with noise: how many of those may be counted on to tell nobody their noise.

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
    noise: float = 0.0
    least: int = 0
    honest: int = 0

    def __post_init__(self) -> None:
        FixedPoint(WIDER * self.clip, self.clients, self.max_weight, self.bits)
        if not (math.isfinite(self.norm) and 0 <= self.norm <= 1e12):
            raise RecipeError(f"secure-sum: norm={self.norm:g} is not in 0..1e12")
        if self.norm > float(np.float32(self.clip)):  # noise is measured in clips, and must be so
            raise RecipeError(
                f"secure-sum: norm={self.norm:g} is above clip={self.clip:g}, so noise of a given "
                "multiple of the clip would be less than that multiple of the norm; choose "
                "clip=norm or more"
            )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise RecipeError(f"secure-sum: noise={self.noise:g} is no multiple of the norm")
        if self.noise:
            self._check_noise()

    def _check_noise(self) -> None:
        plain = self.norm > 0 and self.equal and not self.by_index
        if not (plain and 1 <= self.honest <= self.least <= self.clients):
            raise RecipeError(
                f"secure-sum: noise of the clients needs a norm, equal weights, and 1 <= honest="
                f"{self.honest} <= least={self.least} <= clients={self.clients}: draw a larger "
                "cohort, or count on fewer that drop out or are in league with the server"
            )
        if self._room > MAX_CLIENTS or self.share < LEAST_SHARE:
            raise RecipeError(
                f"secure-sum: {self.bits} bits have no room for noise of {self.noise:g} times the "
                f"clip by {self.clients} clients; choose bits=32, less noise, or smaller cohorts"
            )

    @property
    def _room(self) -> int:
        """How many clients' values the range has room for: the clients, and the noise's tails.

        A share is rounded up to whole steps, of which it has :data:`LEAST_SHARE` at least, and so
        is larger by a quarter at most.
        """
        if not self.noise:
            return self.clients
        tails = 1.25 * TAILS * self.noise * math.sqrt(self.clients / self.honest)
        return math.ceil(self.clients + tails)

    @cached_property
    def _values(self) -> FixedPoint:
        return FixedPoint(self.clip, self._room, self.max_weight, self.bits)

    @property
    def share(self) -> int:
        """Parameter of the discrete Gaussian noise that each client adds to each number, in steps.

        Of the ``honest`` together: ``noise`` times the norm, or a little more.
        """
        return math.ceil(self.noise * self._values.levels / math.sqrt(max(1, self.honest)))

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
        """The sum of weight times value, with the clients' noise if there is any.

        Raises:
            RingError: if it is larger than so many clients can make it.
        """
        if not self.noise:
            return self._values.total(numbers, clients)
        if clients > self.clients:
            raise RingError(f"secure sum: the sum of {clients} clients; at most {self.clients}")
        found = self._values.total(numbers, self._room)
        tails = TAILS * self.share * math.sqrt(clients)
        most = self.lsb * (clients * self._values.levels + tails)
        if float(np.abs(found).max(initial=0.0)) > most * (1 + 1e-9):
            raise RingError(
                f"secure sum: a value of the sum is beyond {most:.4g}, which {clients} clients and "
                "their noise do not reach; somebody sent other numbers, the sum is void"
            )
        return found

    def longest(self, clients: int, size: int) -> float:
        """Euclidean norm that so many clients' vectors and their noise reach together, at most.

        The noise's part is a tail of Hsu, Kakade and Zhang 2012 for sub-Gaussian vectors: it is
        passed with a probability of e^-50.
        """
        noise = self.share * self.lsb * math.sqrt(clients) if self.noise else 0.0
        return clients * self.norm + noise * (math.sqrt(size) + TAILS)

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
        """Plain values, for a message; those of the noise only if there is any."""
        found = asdict(self)
        return found if self.noise else {key: found[key] for key in found.keys() - _OF_NOISE.keys()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Ring:
        """The inverse of :meth:`to_mapping`.

        Raises:
            SecretError: on a field missing, unknown or of a wrong type.
            RecipeError: if a number is out of its bounds.
        """
        named: dict[str, type] = {"float": float, "int": int, "bool": bool}
        kinds = {f.name: named[str(f.type)] for f in fields(cls)}
        if not _OF_NOISE.keys() & values.keys():
            values = {**_OF_NOISE, **values}
        if set(values) != set(kinds) or any(type(values[k]) is not kinds[k] for k in kinds):
            raise SecretError(f"a ring has exactly the fields {', '.join(sorted(kinds))}")
        return cls(**values)
