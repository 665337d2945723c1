"""Client-level privacy where updates are added up: clip, sum, noise, a divisor that is fixed.

What counts is the vector that a client transmits: the changes of exactly the tensors that its
assignment sends (B alone, the cores alone, ...; heads too), as one flat vector x. Then

    released = (sum_k x_k min(1, C / ||x_k||) + N(0, (z C)^2)) / m,

with m the *expected* number of clients, which does not depend on who came (McMahan et al. 2018,
1710.06963, algorithm 1 and section 3, estimator f_f). One client more or less moves the sum by at
most C, whatever it sends: any norm, any gauge of its factors, nothing at all; what is NaN was
refused before and counts as nothing. All that comes after, the server's optimiser, an SVD, handing
out, looks at the released mean only and costs nothing. What is not transmitted gets no noise.

Where a client sends one factor and the other one has orthonormal rows (fedsvd) or the frame is
orthonormal (fed-sb), ||x|| is the norm of the change of the product too, up to the scale.

**Whole numbers.** The clipped vectors are rounded towards zero to multiples of a power of two
about 2^-40 C and added as integers, so the sum is exact and no order of adding changes it; the
noise is rounded to the same grid and added as integers. Since the sum lies on the grid,
``sum + round(noise) = round(sum + noise)``: what is released is a function of the Gaussian
mechanism's output and of nothing else. The gaps of floating-point numbers, which give sums away
where noise is added to floats (Mironov 2012), do not depend on the data here.

A client may clip by itself (:func:`clip_update`), where a secure sum hides the vectors from the
server; clipping twice is clipping once.

    >>> import numpy as np
    >>> clip_update(np.array([3.0, 4.0]), clip=1.0).vector.round(6).tolist()
    [0.6, 0.8]
    >>> total = on_grid(np.array([0.6, 0.8]), clip=1.0)
    >>> noisy(total, 1.0, np.array([0.0, 0.5])).round(6).tolist()
    [0.6, 1.3]
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.core_basis import basis
from aggregation.errors import AggregationError
from aggregation.low_rank import Array
from aggregation.parcel_keys import CORE, core_seed, gather, sizes
from aggregation.reducing import Reduced
from aggregation.spec import AdapterSpec

Whole = npt.NDArray[np.int64]
_GRID_BITS = 40  # below the clip; with 2^20 clients and noise of 2^14 clips, sums stay below 2^62
_SHORTER = 1.0 - 2.0**-40  # so that rounding in the scaling cannot leave a norm above the clip
CLIP = "clip"  # the buffer that remembers an adaptive clip


class ClipError(AggregationError):
    """A vector that cannot be clipped, since it has values that are NaN or infinite."""


class Normals(Protocol):
    """The noise of one round."""

    def __call__(self, name: str, count: int) -> Array:
        """So many independent standard normal numbers; the same ones for the same name."""


class Noise(Protocol):
    """Where noise comes from; it is only to be had for what it costs."""

    def pay(self, number: int, inputs: str) -> Normals:
        """Record what a round costs, durably, and give its noise.

        Args:
            number: of the round, from 1.
            inputs: hex fingerprint of all that the noise is going to be added to. A round that is
                repeated with the same inputs gets the same noise and costs nothing more; one with
                other inputs gets fresh noise, and costs again.
        """


@dataclass(frozen=True, eq=False)
class Clipped:
    """A clipped vector, float64, and whether it was within the clip before."""

    vector: Array
    within: bool


@dataclass(frozen=True)
class Release:
    """How one round's sum is released: what a piece says, in numbers.

    Attributes:
        clip: C, the largest Euclidean norm of one client's vector; above 0.
        multiplier: standard deviation of the noise on the sum, over ``clip``.
        cohort: m, the expected number of clients, by which the sum is divided.
        count_std: standard deviation of the noise on the number of vectors within the clip; 0 if
            they are not counted.
    """

    clip: float
    multiplier: float
    cohort: float
    count_std: float = 0.0


def transmitted(adapter: Adapter, start: Adapter, keys: Sequence[str]) -> Array:
    """What a client sends as one vector, float64: the changes of these tensors, flat.

    Args:
        adapter: after training, at the ranks of ``start``.
        start: before it.
        keys: from :func:`aggregation.parcel.sent_keys`; a core's change is that of its r x r
            numbers.
    """
    return np.subtract(gather(adapter, keys), gather(start, keys), dtype=np.float64)


def clip_update(change: npt.NDArray[np.floating], clip: float) -> Clipped:
    """A vector scaled down to a Euclidean norm of at most ``clip``; pure, for either side.

    Args:
        change: of any length, from :func:`transmitted`.
        clip: C; above 0.

    Raises:
        ClipError: if a value is NaN or infinite: there is no such vector.
    """
    vector = np.asarray(change, np.float64)
    largest = float(np.max(np.abs(vector), initial=0.0))
    if not math.isfinite(largest):
        raise ClipError("the update has values that are NaN or infinite, and cannot be clipped")
    if largest == 0.0:
        return Clipped(vector, True)
    norm = largest * float(np.linalg.norm(vector / largest))  # squares do not overflow
    if norm <= clip:
        return Clipped(vector, True)
    return Clipped(vector * (clip / norm * _SHORTER), False)


def on_grid(vector: Array, clip: float) -> Whole:
    """A vector as whole numbers of :func:`step` each, rounded towards zero: never longer."""
    return np.trunc(vector / step(clip)).astype(np.int64)


def step(clip: float) -> float:
    """The grid's step: a power of two, 2^-41 to 2^-40 of the clip."""
    return float(math.ldexp(1.0, math.frexp(clip)[1] - _GRID_BITS - 1))


def noisy(total: Whole, clip: float, noise: Array) -> Array:
    """A sum of clipped vectors with noise, float64: what the server may look at.

    Args:
        total: the sum of :func:`on_grid` of each, however it was formed.
        clip: their clip.
        noise: in units of the clip: ``z`` times standard normals.
    """
    size = step(clip)
    return np.asarray((total + np.rint(noise * (clip / size)).astype(np.int64)) * size)


@dataclass
class VectorSum:
    """One round's sum of vectors in progress.

    Attributes:
        size: numbers in a vector.
        release: clip, noise and divisor.
        number: of the round, from 1.
        noise: where noise comes from.
        about: what the vectors are, for the fingerprint.
        total: the sum so far, in steps of the grid.
        balance: how many vectors were within the clip, minus how many were longer.
    """

    size: int
    release: Release
    number: int
    noise: Noise
    about: str = ""
    total: Whole = field(init=False)
    balance: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.size, np.int64)

    def add(self, vector: npt.NDArray[np.floating]) -> None:
        """Clip one client's vector and add it.

        Raises:
            ClipError: if it has values that are NaN or infinite, or another length; the sum is as
                it was.
        """
        if vector.shape != self.total.shape:
            raise ClipError(f"a vector has shape {vector.shape}, expected {self.total.shape}")
        clipped = clip_update(vector, self.release.clip)
        self.total += on_grid(clipped.vector, self.release.clip)
        self.balance += 1 if clipped.within else -1

    def add_sum(self, vector: Array, clients: int) -> None:
        """Add the sum of vectors that their clients have clipped, where nobody sees them apart.

        Args:
            vector: the sum.
            clients: how many they are; they count as within the clip.

        Raises:
            ClipError: if it has another length, or is longer than so many clipped vectors can be:
                somebody did not clip, and nothing can be said of what one client is in it.
        """
        if vector.shape != self.total.shape:
            raise ClipError(f"a sum has shape {vector.shape}, expected {self.total.shape}")
        norm, most = float(np.linalg.norm(vector)), clients * self.release.clip
        if not norm <= most * (1 + 1e-9):
            raise ClipError(
                f"the sum of {clients} vectors has norm {norm:.4g}, which vectors clipped to "
                f"{self.release.clip:g} cannot have: somebody did not clip"
            )
        self.total += np.rint(vector / step(self.release.clip)).astype(np.int64)
        self.balance += clients

    def inputs(self) -> str:
        """Hex SHA-256 of all that decides what is released, but the noise."""
        said = (self.number, self.about, self.release, self.balance)
        vector = self.total.astype("<i8").tobytes()
        return hashlib.sha256(repr(said).encode() + b"\0" + vector).hexdigest()

    def mean(self) -> tuple[Array, float]:
        """Pay for the noise, add it, and divide by the expected number of clients.

        Returns:
            The noisy mean; and the noisy share of the vectors that were within the clip, NaN if
            they are not counted. It may lie outside 0 to 1.
        """
        release, normals = self.release, self.noise.pay(self.number, self.inputs())
        drawn = normals("sum", self.size) * release.multiplier
        mean = noisy(self.total, release.clip, drawn) / release.cohort
        if not release.count_std:
            return mean, math.nan
        # Each client counts 1/2 or -1/2, so that one more or less moves the sum by 1/2.
        doubled = np.array([self.balance << _GRID_BITS], np.int64)
        noise = 2.0 * release.count_std * normals("count", 1)
        return mean, 0.5 + float(noisy(doubled, 1.0, noise)[0]) / 2.0 / release.cohort


@dataclass(frozen=True)
class ClippedSum:
    """One round's sum of updates in progress: an accumulator, see :mod:`aggregation.reducing`.

    Attributes:
        spec: of the global adapter.
        keys: the tensors that clients send in this round.
        vectors: the sum of what they send.
        adapt: the clip of the next round from the noisy share of vectors within this one's; None
            to keep the clip.
    """

    spec: AdapterSpec
    keys: tuple[str, ...]
    vectors: VectorSum
    adapt: Callable[[float], float] | None = None

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Clip one client's changes and add them; all weights are equal.

        Raises:
            ClipError: if there are values that are NaN or infinite; the sum is as it was.
        """
        self.vectors.add(transmitted(adapter, start, self.keys))

    def finish(self, total: float) -> Reduced:
        """The noisy mean over the expected number of clients, however many came.

        Args:
            total: the weight of those who came; not used, since it is theirs.
        """
        mean, share = self.vectors.mean()
        reduced = spread(self.spec, self.keys, mean)
        if self.adapt is None:
            return reduced
        return replace(reduced, buffers={CLIP: np.array([self.adapt(share)])})


def spread(spec: AdapterSpec, keys: Sequence[str], mean: Array) -> Reduced:
    """The transmitted vector as a change of the adapter; zero where nothing was transmitted."""
    tensors = {key: np.zeros(shape) for key, shape in spec.shapes().items()}
    seed = core_seed(keys)
    frames = basis(spec, seed) if seed is not None else {}
    place = 0
    for key, count in zip(keys, sizes(keys, spec), strict=True):
        part = mean[place : place + count]
        place += count
        if key.startswith(CORE):
            name = key.split(":", 2)[2]
            module = spec.module(name)
            core = part.reshape(module.rank, module.rank)
            tensors[module.keys[1]] = frames[name][0] @ core
        else:
            tensors[key] = part.reshape(spec.layout[key][2])
    factors = {m.name: (tensors[m.keys[1]], tensors[m.keys[0]]) for m in spec.modules}
    others = {tensor.key: tensors[tensor.key] for tensor in spec.others}
    return Reduced({}, factors, others)
