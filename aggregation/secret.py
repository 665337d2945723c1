"""What a client gives to a secure sum, as whole numbers, and what the sum of them says.

The weight of a client must not be known either, so it travels in the vector: values are multiplied
by it, and it is added up along with them. A vector holds, in this order,

* the change of every value that is sent, times the weight: on the scale of ``clip``;
* for a sketched mean, the sketches times the weight: on a scale eight times as wide (a Gaussian
  projection of a row of norm ``clip`` stays within it but for one number in 10^15);
* for a mean by rank index, the weight of every index that the client changed;
* the weight, but for equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.clipped_sum import clip_update, spread, transmitted
from aggregation.low_rank import Array
from aggregation.parcel_keys import sent_keys, sizes
from aggregation.reducing import Reduced
from aggregation.ring import Numbers
from aggregation.secret_ring import Ring, SecretError
from aggregation.sketches import Sketches, sketch_shapes
from aggregation.spec import AdapterSpec


@dataclass(frozen=True, eq=False)
class Summed:
    """What the server learns of the clients of a round: sums of weight times change.

    Attributes:
        change: of the factors and of the tensors outside the modules: sums, not means.
        weight: of all clients together.
        clients: how many they are.
        bound: how far each value of the mean can be from the exact one.
        sketches: by module, of shape (d_out, columns); empty if there are none.
        indices: by module, the weight of each rank index; empty if they are not added up.
        vector: the changes that travelled as one vector, in the order of their keys.
        longest: Euclidean norm that this vector can have, where clients scale theirs down; else 0.
    """

    change: Reduced
    weight: float
    clients: int
    bound: float
    sketches: Mapping[str, Array]
    indices: Mapping[str, Array]
    vector: Array
    longest: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Where in a vector what is.

    Attributes:
        spec: of the adapter.
        assignment: what clients send of it.
        ring: how numbers enter.
    """

    spec: AdapterSpec
    assignment: Assignment
    ring: Ring

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The tensors that travel."""
        return sent_keys(self.spec, self.assignment)

    @cached_property
    def sketches(self) -> dict[str, tuple[int, int]]:
        """Shapes of the sketches, by module."""
        columns = self.assignment.sketch
        return sketch_shapes(self.spec, columns) if columns else {}

    @cached_property
    def _parts(self) -> tuple[int, int, int, int]:
        ring = self.ring
        ranks = sum(m.rank for m in self.spec.modules) if ring.by_index else 0
        return (
            sum(sizes(self.keys, self.spec)),
            sum(math.prod(shape) for shape in self.sketches.values()),
            ranks * ring.digits,
            0 if ring.equal else ring.digits,
        )

    @property
    def length(self) -> int:
        """How many numbers a vector has."""
        return sum(self._parts)

    def secret(
        self, adapter: Adapter, start: Adapter, weight: float, sketches: Sketches
    ) -> Numbers:
        """A client's vector, as ring elements: what nobody but the client may see.

        Args:
            adapter: as it would be sent.
            start: what training started from.
            weight: of the client; not used with equal weights.
            sketches: of the first pass, if there are any.

        Raises:
            RingError: if a value or the weight is out of its range.
            AggregationError: if something does not fit the layout, or is not finite.
        """
        ring, weight = self.ring, 1.0 if self.ring.equal else weight
        change = transmitted(adapter, start, self.keys)
        if ring.norm:
            change = clip_update(change, ring.norm).vector
        parts = [ring.numbers(change, weight)]
        parts += [ring.wide.numbers(flat(sketches, self.sketches), weight)] if self.sketches else []
        if ring.by_index:
            moved = np.concatenate([_moved(adapter, start, m.name) for m in self.spec.modules])
            parts.append(ring.weights(moved * weight))
        if not ring.equal:
            parts.append(ring.weights(np.array([weight])))
        return np.concatenate(parts)

    def read(self, numbers: Numbers, clients: int) -> Summed:
        """What the sum of such vectors says.

        Args:
            numbers: the sum of ring elements, modulo 2^32.
            clients: how many were added.

        Raises:
            RingError: if so many clients cannot have made this sum.
            SecretError: if it has another length, or nobody has any weight.
        """
        if numbers.shape != (self.length,):
            raise SecretError(f"the sum has {numbers.size} numbers, expected {self.length}")
        ring = self.ring
        values, drawn, counted, last = np.split(numbers, np.cumsum(self._parts)[:-1])
        weight = float(clients) if ring.equal else float(ring.weight_sums(last, clients)[0])
        if not weight > 0:
            raise SecretError(f"the {clients} clients of the sum have no weight")
        vector = ring.sums(values, clients)
        indices = {}
        if ring.by_index:
            ranks = [m.rank for m in self.spec.modules]
            found = np.split(ring.weight_sums(counted, clients), np.cumsum(ranks)[:-1])
            indices = {m.name: part for m, part in zip(self.spec.modules, found, strict=True)}
        sketches = unflat(ring.wide.sums(drawn, clients), self.sketches) if self.sketches else {}
        return Summed(
            change=spread(self.spec, self.keys, vector),
            weight=weight,
            clients=clients,
            bound=ring.bound(clients, weight),
            sketches=sketches,
            indices=indices,
            vector=vector,
            longest=ring.longest(clients, vector.size) if ring.norm else 0.0,
        )


def flat(matrices: Sketches, shapes: Mapping[str, Sequence[int]]) -> Array:
    """Matrices one after the other, float64, in the order of their shapes.

    Raises:
        SecretError: if they have other names or shapes.
    """
    if {k: tuple(m.shape) for k, m in matrices.items()} != {k: tuple(s) for k, s in shapes.items()}:
        raise SecretError("the sketches have other modules or shapes than were agreed on")
    return np.concatenate([np.asarray(matrices[k], np.float64).ravel() for k in shapes])


def unflat(vector: Array, shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """The inverse of :func:`flat`."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    parts = np.split(vector, ends)
    return {k: p.reshape(tuple(shapes[k])) for k, p in zip(shapes, parts, strict=True)}


def _moved(adapter: Adapter, start: Adapter, module: str) -> Array:
    """1 for each rank index that changed, else 0: what reduce=index-mean looks at."""
    (left, right), (left0, right0) = adapter.factors(module), start.factors(module)
    moved = np.any(left != left0, axis=0) | np.any(right != right0, axis=1)
    return np.asarray(moved, np.float64)
