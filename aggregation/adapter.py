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
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec

FloatArray = npt.NDArray[np.float32]


class AdapterError(AggregationError):
    """Tensors that do not fit their specification."""


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

    def __post_init__(self) -> None:
        shapes = self.spec.shapes()
        missing, extra = set(shapes) - set(self.tensors), set(self.tensors) - set(shapes)
        if missing or extra:
            raise AdapterError(
                f"tensors do not match the specification: missing {sorted(missing)[:3]}, "
                f"unknown {sorted(extra)[:3]}"
            )
        checked = {}
        for key, shape in shapes.items():
            value = np.asarray(self.tensors[key])
            if value.dtype.kind != "f" or value.shape != shape:
                raise AdapterError(
                    f"{key}: expected floats of shape {shape}, "
                    f"got {value.dtype} of shape {value.shape}"
                )
            # A view of an immutable copy: nobody holds a writable alias of what the digest covers.
            copy = np.array(value, dtype=np.float32, order="C")
            copy.flags.writeable = False
            checked[key] = copy
        object.__setattr__(self, "tensors", MappingProxyType(checked))

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
        for key, value in self.tensors.items():
            hasher.update(b"\0" + key.encode() + b"\0")
            hasher.update(value.astype("<f4", copy=False).tobytes())
        return "sha256:" + hasher.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as float32."""
        return 4 * self.spec.size

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(bool(np.isfinite(value).all()) for value in self.tensors.values())

    def pack(self) -> FloatArray:
        """All tensors as one float32 vector, in canonical order: how it travels in Flower."""
        return np.concatenate([value.ravel() for value in self.tensors.values()])

    @classmethod
    def unpack(cls, spec: AdapterSpec, vector: npt.NDArray[Any]) -> Adapter:
        """The inverse of :meth:`pack`.

        Raises:
            AdapterError: if the vector has another length or is not of floats.
        """
        if vector.ndim != 1 or vector.size != spec.size or vector.dtype.kind != "f":
            raise AdapterError(
                f"expected {spec.size} floats in one vector, "
                f"got {vector.dtype} of shape {vector.shape}"
            )
        tensors, start = {}, 0
        for key, shape in spec.shapes().items():
            stop = start + int(np.prod(shape))
            tensors[key] = vector[start:stop].reshape(shape)
            start = stop
        return cls(spec, tensors)

    @classmethod
    def zeros(cls, spec: AdapterSpec) -> Adapter:
        """An adapter that changes nothing and whose head answers zero."""
        return cls(spec, {key: np.zeros(shape, np.float32) for key, shape in spec.shapes().items()})
