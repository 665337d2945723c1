"""An adapter as a value: a specification and its tensors, immutable, with a canonical digest.

    >>> import numpy as np
    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> adapter = Adapter(spec, {key: np.ones(shape) for key, shape in spec.shapes().items()})
    >>> adapter.pack().shape
    (24,)
    >>> Adapter.unpack(spec, adapter.pack()).digest == adapter.digest
    True

Tensors are float32 in memory, whatever they travel as. The digest covers the specification and
every value bit for bit; it does not cover how the adapter was stored or sent.

All values lie in one vector, in canonical order, and the tensors are views of it: packing is free,
and what looks at every value (checks, sums, comparisons) is one pass over one array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec

FloatArray = npt.NDArray[np.float32]
# Two adapters that differ do so at once, nearly always: the rest is looked at only if this agrees.
_PROBE = 1024


class AdapterError(AggregationError):
    """Tensors that do not fit their specification."""


class _Tensors(Mapping[str, FloatArray]):
    """The tensors of a packed vector, each a view that is made when somebody asks for it."""

    __slots__ = ("_layout", "_vector")

    def __init__(self, spec: AdapterSpec, vector: FloatArray) -> None:
        self._layout = spec.layout
        self._vector = vector

    def __getitem__(self, key: str) -> FloatArray:
        first, behind, shape = self._layout[key]
        return self._vector[first:behind].reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A specification and its tensors, by PEFT name. Compare adapters by ``digest``.

    Attributes:
        spec: shapes, ranks, scales and the base that the adapter belongs to.
        tensors: read-only float32 arrays, exactly those of ``spec.shapes()``, in that order.

    Raises:
        AdapterError: if a tensor is missing, unknown, of another shape, or not of numbers.
    """

    spec: AdapterSpec
    tensors: Mapping[str, npt.NDArray[Any]]
    _vector: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        layout = self.spec.layout
        if layout.keys() != self.tensors.keys():
            missing, extra = set(layout) - set(self.tensors), set(self.tensors) - set(layout)
            raise AdapterError(
                f"tensors do not match the specification: missing {sorted(missing)[:3]}, "
                f"unknown {sorted(extra)[:3]}"
            )
        parts = []
        for key, (_, _, shape) in layout.items():
            value = np.asarray(self.tensors[key])
            if value.dtype.kind != "f" or value.shape != shape:
                raise AdapterError(
                    f"{key}: expected floats of shape {shape}, "
                    f"got {value.dtype} of shape {value.shape}"
                )
            parts.append(np.ascontiguousarray(value, np.float32).data)
        self._hold(np.frombuffer(b"".join(parts), np.float32))

    def _hold(self, vector: FloatArray) -> None:
        """Take over a vector of bytes, which cannot change: no alias of them is writable."""
        object.__setattr__(self, "_vector", vector)
        object.__setattr__(self, "tensors", _Tensors(self.spec, vector))

    def factors(self, module: str) -> tuple[FloatArray, FloatArray]:
        """B of shape (d_out, r) and A of shape (r, d_in) of one module, scale not folded in."""
        key_a, key_b = self.spec.module(module).keys
        return self.tensors[key_b], self.tensors[key_a]

    def __iter__(self) -> Iterator[tuple[str, FloatArray]]:
        return iter(self.tensors.items())

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` over the specification and the little-endian tensors, in order."""
        hasher = hashlib.sha256(self.spec.to_json().encode())
        little = self._vector.astype("<f4", copy=False)
        for key, (first, behind, _) in self.spec.layout.items():
            hasher.update(b"\0" + key.encode() + b"\0")
            hasher.update(little[first:behind].data)
        return "sha256:" + hasher.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as float32."""
        return 4 * self.spec.size

    def within(self, limit: float) -> bool:
        """Whether no value is NaN, infinite, or larger in size than the limit.

        No square is larger than the sum of all squares, which takes one pass; only where that says
        too little are the values looked at one by one. (Rounding cannot hide a large one: a sum of
        what is positive never falls.)
        """
        with np.errstate(over="ignore"):
            squares = float(self._vector @ self._vector)
        if squares < 0.99 * limit**2:
            return True
        return max(-float(self._vector.min()), float(self._vector.max())) <= limit

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return self.within(float(np.finfo(np.float32).max))

    def same_values(self, other: Adapter) -> bool:
        """Whether two adapters have one specification and no value that differs."""
        mine, theirs = self._vector, other._vector
        return (
            (self.spec is other.spec or self.spec == other.spec)
            and np.array_equal(mine[:_PROBE], theirs[:_PROBE])
            and np.array_equal(mine, theirs)
        )

    def pack(self) -> FloatArray:
        """All tensors as one float32 vector, in canonical order: how it travels in Flower.

        It is the adapter's own and read-only; ``pack().copy()`` may be changed.
        """
        return self._vector

    @classmethod
    def unpack(cls, spec: AdapterSpec, vector: npt.NDArray[Any]) -> Adapter:
        """The inverse of :meth:`pack`.

        Args:
            spec: what the values are.
            vector: copied, unless it is a view of ``bytes``, as what came by a message is.

        Raises:
            AdapterError: if the vector has another length or is not of floats.
        """
        if vector.ndim != 1 or vector.size != spec.size or vector.dtype.kind != "f":
            raise AdapterError(
                f"expected {spec.size} floats in one vector, "
                f"got {vector.dtype} of shape {vector.shape}"
            )
        adapter = object.__new__(cls)
        object.__setattr__(adapter, "spec", spec)
        flags, owner = vector.flags, cast(object, vector.base)
        whole = vector.dtype == np.float32 and flags.c_contiguous and flags.aligned
        if not (whole and isinstance(owner, bytes)):
            vector = np.frombuffer(vector.astype(np.float32, copy=False).tobytes(), np.float32)
        adapter._hold(vector)
        return adapter

    @classmethod
    def zeros(cls, spec: AdapterSpec) -> Adapter:
        """An adapter that changes nothing and whose head answers zero."""
        return cls.unpack(spec, np.zeros(spec.size, np.float32))
