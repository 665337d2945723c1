"""Running sums of updates: many in, one mean out, in memory that does not grow with their number.

    >>> import numpy as np
    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> start, trained = Adapter.zeros(spec), Adapter.unpack(spec, np.ones(24, np.float32))
    >>> sums = ProductSums(spec)
    >>> for _ in range(1000):
    ...     sums.add(trained, start, weight=2.0)
    >>> float(sums.result(1 / 2000)["query"].dense()[0, 0])
    16.0

Sums carry unnormalised weights and are in float64. An update is touched once, as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from aggregation.adapter import Adapter, FloatArray
from aggregation.low_rank import Array, LowRank
from aggregation.running_sum import Factor, RunningSum, Scratch
from aggregation.spec import AdapterSpec

_CHUNK = 1 << 15  # values that are summed at a time: enough to stay in the cache


class TensorSum:
    """The sum of ``weight * (x_k - x_k0)`` over named tensors.

    A difference is taken before it is weighed: what a client did not change adds exactly nothing.

    Args:
        spec: of the adapter that the sum is for.
        keys: names of the tensors, in canonical order; of the same shapes in every adapter.
    """

    def __init__(self, spec: AdapterSpec, keys: Iterable[str]) -> None:
        self._keys = tuple(keys)
        self._shapes = [spec.layout[key][2] for key in self._keys]
        self._sum = np.zeros(sum(math.prod(shape) for shape in self._shapes))
        self._step, self._origin = np.empty((2, min(_CHUNK, self._sum.size)))
        self._converted: Adapter | None = None  # whose values are in _origin, if they fit in there
        self._layouts: tuple[AdapterSpec, AdapterSpec] = (spec, spec)
        self._places = list(self._ranges(spec, spec))

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Add one adapter's change."""
        if adapter.spec is not self._layouts[0] or start.spec is not self._layouts[1]:
            self._layouts = (adapter.spec, start.spec)
            self._places = list(self._ranges(adapter.spec, start.spec))
            self._converted = None
        place = 0
        for first, origin, count in self._places:
            for at in range(0, count, _CHUNK):
                size = min(_CHUNK, count - at)
                step, before = self._step[:size], self._origin[:size]
                # Copying converts faster than arithmetic would.
                np.copyto(step, adapter.pack()[first + at : first + at + size])
                if self._converted is not start:
                    np.copyto(before, start.pack()[origin + at : origin + at + size])
                step -= before
                step *= weight
                self._sum[place + at : place + at + size] += step
            place += count
        fits = len(self._places) == 1 and self._sum.size == len(self._origin)
        self._converted = start if fits else None

    def finish(self, factor: float) -> dict[str, Array]:
        """The sum times a factor, by tensor; to be asked for once, as nothing is copied."""
        self._sum *= factor
        out, place = {}, 0
        for key, shape in zip(self._keys, self._shapes, strict=True):
            count = math.prod(shape)
            out[key] = self._sum[place : place + count].reshape(shape)
            place += count
        return out

    def _ranges(self, ours: AdapterSpec, theirs: AdapterSpec) -> Iterator[tuple[int, int, int]]:
        """Where the tensors lie in both packed vectors, neighbours taken together."""
        first = origin = count = 0
        for key in self._keys:
            (at, behind, _), (there, _, _) = ours.layout[key], theirs.layout[key]
            if (at, there) != (first + count, origin + count):
                if count:
                    yield first, origin, count
                first, origin, count = at, there, 0
            count += behind - at
        if count:
            yield first, origin, count


class ProductSums:
    """The exact sum of ``weight * s (B A - B0 A0)``, by module.

    Starts are few and shared: each enters once, with the summed weight of those that began there.
    A factor that a client left as it was, as with recipes that train one of the two, makes its
    change thin: ``s (B - B0) A0``, and all such are one sum of factors.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        scratch = Scratch()
        self._sums = {m.name: RunningSum(m.d_out, m.d_in, scratch) for m in spec.modules}
        self._origins: dict[str, _Origin] = {}
        self._scales: tuple[AdapterSpec, dict[str, float]] = (spec, _scales(spec))

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Add one adapter's change relative to its start."""
        if adapter.spec is not self._scales[0]:
            self._scales = (adapter.spec, _scales(adapter.spec))
        origin = self._origins.get(start.digest)
        if origin is None:
            origin = self._origins[start.digest] = _Origin(start)
        for name, scale in self._scales[1].items():
            left, right = adapter.factors(name)
            if not origin.moved(name, left, right, scale, weight):
                self._sums[name].add(left, right, weight * scale)

    def result(self, factor: float) -> Mapping[str, LowRank]:
        """The sums times a factor; each is put together when it is asked for."""
        for origin in self._origins.values():
            for name, left, right, weight in origin.terms():
                self._sums[name].add(left, right, weight)
        self._origins = {}
        return Lazy(self._sums, lambda name: self._sums[name].result(factor))


class _Origin:
    """What began at one start: how much of it, and changes of one factor only."""

    def __init__(self, start: Adapter) -> None:
        names = [module.name for module in start.spec.modules]
        self._factors = {name: start.factors(name) for name in names}
        self._scales = _scales(start.spec)
        self._weights = dict.fromkeys(names, 0.0)
        self._left: dict[str, Array] = {}
        self._right: dict[str, Array] = {}

    def moved(
        self, name: str, left: FloatArray, right: FloatArray, scale: float, weight: float
    ) -> bool:
        """Note what began here, and whether one factor stayed: then its change is noted as well."""
        left0, right0 = self._factors[name]
        if left.shape == left0.shape and scale == self._scales[name]:
            if _same(right, right0):
                _accumulate(self._left, name, left, left0, weight * scale)
                return True
            if _same(left, left0):
                _accumulate(self._right, name, right, right0, weight * scale)
                return True
        self._weights[name] += weight
        return False

    def terms(self) -> Iterator[tuple[str, Factor, Factor, float]]:
        """What has to be added to the other terms: (module, left, right, weight)."""
        for name, (left0, right0) in self._factors.items():
            if self._weights[name]:
                yield name, left0, right0, -self._weights[name] * self._scales[name]
            if name in self._left:
                yield name, self._left[name], right0, 1.0
            if name in self._right:
                yield name, left0, self._right[name], 1.0


class Lazy(Mapping[str, LowRank]):
    """Matrices by module, each made when it is asked for: they are never all there at once."""

    def __init__(self, names: Iterable[str], make: Callable[[str], LowRank]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> LowRank:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _scales(spec: AdapterSpec) -> dict[str, float]:
    return {module.name: spec.scale(module.name) for module in spec.modules}


def _same(one: FloatArray, other: FloatArray) -> bool:
    """Whether two arrays are equal; two that differ nearly always do in their first value."""
    return one.item(0) == other.item(0) and bool(np.array_equal(one, other))


def _accumulate(
    sums: dict[str, Array], name: str, new: FloatArray, old: FloatArray, weight: float
) -> None:
    step = np.subtract(new, old, dtype=np.float64)
    step *= weight
    if name in sums:
        sums[name] += step
    else:
        sums[name] = step
