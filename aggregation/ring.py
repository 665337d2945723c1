"""Numbers as whole numbers modulo a power of two: what a secure sum adds.

The scale is chosen so that the sum over the largest cohort cannot overflow, and everything that
could is refused beforehand: a coordinate beyond the public range, a weight above the maximum, a
client too many. With n clients at most and ``bits`` bits, each has ``L`` levels on either side::

    L = floor((2^(bits-1) - 1) / n),    LSB = clip * max_weight / L,    q = rint(w d / LSB)

so ``|sum q| <= n L < 2^(bits-1)``. Rounding is to nearest, so each client adds an error of at most
LSB / 2 to each coordinate of the sum of w d, and the mean of K clients is off by at most
``K LSB / (2 sum w)``. (Flower 1.41's SecAgg+ rounds after dividing by a fixed maximal weight at a
fixed scale, wraps around silently, and sends 8 bytes a coordinate.)

    >>> import numpy as np
    >>> ring = FixedPoint(clip=0.5, clients=10, max_weight=100.0)
    >>> total = ring.numbers(np.float32([0.25, -0.5]), weight=40.0)
    >>> total = total + ring.numbers(np.float32([0.0, 0.5]), weight=60.0)
    >>> ring.mean(total, total_weight=100.0, clients=2).round(6).tolist()
    [0.1, 0.1]
    >>> ring.numbers(np.float32([0.75]))
    Traceback (most recent call last):
    ...
    aggregation.ring.RingError: codec ring: 1 of 1 values lie beyond clip=0.5 ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation.adapter import FloatArray
from aggregation.codec import Codec, CodecError, check_length, check_reach
from aggregation.errors import RecipeError

Numbers = npt.NDArray[np.uint32]
BITS = (16, 24, 32)
MAX_CLIENTS = 1 << 20


class RingError(CodecError):
    """What would overflow, or did: a value, a weight, or a number of clients out of its range."""


@dataclass(frozen=True)
class FixedPoint(Codec):
    """Codec: differences as whole numbers modulo 2^bits, on a scale that all clients share.

    As a codec it carries one client's differences, of weight 1. A secure sum uses :meth:`numbers`,
    adds uint32 arrays (modulo 2^32, of which the low ``bits`` count) and reads :meth:`mean`.

    Attributes:
        clip: public: no difference is larger in absolute value; about 8 standard deviations.
        clients: public: the most clients whose numbers are ever added.
        max_weight: public: the largest weight of a client.
        bits: 32, 24 or 16; a coordinate costs an eighth of it in bytes.
        saturate: cut larger differences to ``clip`` instead of refusing them.
        error_feedback: keep what rounding and cutting took away, and send it next time.
    """

    kind = "ring"
    linear = True
    clip: float = 0.1
    clients: int = 256
    max_weight: float = 1.0
    bits: int = 32
    saturate: bool = False
    error_feedback: bool = False

    def __post_init__(self) -> None:
        for name in ("clip", "max_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 1e-12 <= value <= 1e12):
                raise RecipeError(f"codec=ring: {name}={value:g} is not in 1e-12..1e12")
        if self.bits not in BITS:
            raise RecipeError(f"codec=ring: bits={self.bits} is not one of 16, 24, 32")
        if not 1 <= self.clients <= MAX_CLIENTS:
            raise RecipeError(f"codec=ring: clients={self.clients} is not in 1..{MAX_CLIENTS}")
        if self.levels < 1:
            raise RecipeError(
                f"codec=ring: {self.bits} bits have no level left for each of {self.clients} "
                "clients; choose bits=32, or sum smaller cohorts"
            )

    @property
    def levels(self) -> int:
        """L, the largest whole number of one client."""
        return int((2 ** (self.bits - 1) - 1) // self.clients)

    @property
    def lsb(self) -> float:
        """What one unit means, in weight times value."""
        # As a float32, which is what values are compared with.
        return float(np.float32(self.clip)) * self.max_weight / self.levels

    def numbers(self, vector: FloatArray, weight: float = 1.0) -> Numbers:
        """One client's weighted vector as ring elements.

        Args:
            vector: float32 of shape (n,).
            weight: above 0, at most ``max_weight``.

        Returns:
            uint32 of shape (n,), modulo 2^32.

        Raises:
            RingError: if the weight or a value is out of its range.
            CodecError: if a value is not finite.
        """
        if not 0 < weight <= self.max_weight:
            raise RingError(
                f"codec ring: weight={weight:g} is not above 0 and at most "
                f"max_weight={self.max_weight:g}; raise max_weight for all clients"
            )
        check_reach(vector, self.kind)
        limit = np.float32(self.clip)
        if self.saturate:
            vector = np.clip(vector, -limit, limit)
        beyond = int(np.count_nonzero(np.abs(vector) > limit))
        if beyond:
            raise RingError(
                f"codec ring: {beyond} of {vector.size} values lie beyond clip={self.clip:g} (the "
                f"largest is {float(np.abs(vector).max()):.3g}); raise clip for all clients, or "
                "choose saturate=true"
            )
        scaled = vector.astype(np.float64) * (weight / self.lsb)
        whole = np.clip(np.rint(scaled), -self.levels, self.levels)
        return whole.astype(np.int64).astype(np.uint32)

    def total(self, numbers: Numbers, clients: int) -> npt.NDArray[np.float64]:
        """The sum of weight times value, out of the sum of ring elements.

        Args:
            numbers: uint32 of shape (n,): the sum, modulo 2^32.
            clients: how many were added.

        Returns:
            float64 of shape (n,), off by at most ``clients * lsb / 2`` each.

        Raises:
            RingError: if more clients were added than the scale allows, or the sum is larger than
                that many clients can make it: a client sent what is no number of this ring.
        """
        if not 0 <= clients <= self.clients:
            raise RingError(f"codec ring: the sum of {clients} clients; at most {self.clients}")
        shift = 32 - self.bits
        whole = (numbers.astype(np.uint32) << np.uint32(shift)).view(np.int32) >> shift
        most = int(np.abs(whole.astype(np.int64)).max(initial=0))
        if most > clients * self.levels:
            raise RingError(
                f"codec ring: a coordinate of the sum is {most}, and {clients} clients make at "
                f"most {clients * self.levels}; somebody sent other numbers, the sum is void"
            )
        return whole.astype(np.float64) * self.lsb

    def mean(self, numbers: Numbers, total_weight: float, clients: int) -> npt.NDArray[np.float64]:
        """The weighted mean, out of the sum of ring elements.

        Args:
            numbers: as in :meth:`total`.
            total_weight: sum of the weights.
            clients: as in :meth:`total`.

        Raises:
            RingError: as :meth:`total`; or if that many clients cannot have that weight.
        """
        if not 0 < total_weight <= clients * self.max_weight * (1 + 1e-9):
            raise RingError(
                f"codec ring: total weight {total_weight:g} of {clients} clients of at most "
                f"{self.max_weight:g} each"
            )
        return self.total(numbers, clients) / total_weight

    def to_bytes(self, numbers: Numbers) -> bytes:
        """Ring elements, masked or not, little-endian, of their low ``bits`` bits."""
        plain = numbers.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
        return plain[:, : self.bits // 8].tobytes()

    def from_bytes(self, data: bytes, n: int) -> Numbers:
        """The inverse of :meth:`to_bytes`, modulo 2^bits.

        Raises:
            CodecError: if the length is another.
        """
        check_length(data, self.nbytes(n), self.kind, n)
        out = np.zeros((n, 4), np.uint8)
        out[:, : self.bits // 8] = np.frombuffer(data, np.uint8).reshape(n, self.bits // 8)
        return out.reshape(-1).view("<u4").astype(np.uint32, copy=False)

    def encode(self, vector: FloatArray, turn: int = 0) -> bytes:
        """One client's differences, of weight 1.

        Raises:
            RingError: if a value is out of range, or ``max_weight`` is below 1.
            CodecError: if a value is not finite.
        """
        return self.to_bytes(self.numbers(vector))

    def decode(self, data: bytes, n: int) -> FloatArray:
        """The rounded differences.

        Raises:
            CodecError: if the length is another, or a number is not one client's.
        """
        return self.total(self.from_bytes(data, n), 1).astype(np.float32)

    def nbytes(self, n: int) -> int:
        """An eighth of ``bits`` a value."""
        return n * self.bits // 8
