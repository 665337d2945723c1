"""What the server keeps between rounds, and how it is written down.

>>> from aggregation.init import initial_adapter
>>> from aggregation.spec import AdapterSpec, ModuleSpec
>>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
>>> state = initial_state(initial_adapter(spec, seed=1))
>>> GlobalState.from_bytes(state.to_bytes()).adapter.digest == state.adapter.digest
True
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregation import tensor_file
from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.low_rank import LowRank
from aggregation.spec import AdapterSpec

SCHEMA = 2
_READABLE = (1, 2)  # schema 1 had no buffers
_ROOM = 16  # an adapter of the largest allowed size, its residual and two buffers for each tensor
_BUFFER = re.compile(r"([a-z]+(?:-[a-z]+)*)(?:/([A-Za-z0-9_.]+)(?:/([AB]))?)?\Z")
Buffers = Mapping[str, npt.NDArray[np.float64]]


class StateError(AggregationError):
    """A global state that contradicts itself, or bytes that are not one."""


@dataclass(frozen=True, eq=False)
class GlobalState:
    """The global adapter after a round, and what did not fit into it.

    Attributes:
        adapter: what clients start from.
        residual: by module, the part of the exact update beyond the adapter's rank. It never
            leaves the server and re-enters the next round.
        round: number of rounds aggregated so far.
        buffers: what the server optimiser remembers, float64 and read-only. A name says what and
            of what: ``momentum/<tensor>`` in the tensor's shape; ``momentum/<module>/B`` of shape
            (d_out, R) and ``momentum/<module>/A`` of shape (R, d_in), a low-rank matrix in two
            factors; or ``steps`` of shape (1,), a count.

    Raises:
        StateError: if a residual or a buffer belongs to nothing, has another shape, or holds
            values that are NaN or infinite.
    """

    adapter: Adapter
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    round: int = 0
    buffers: Buffers = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules = {m.name: (m.d_out, m.d_in) for m in self.adapter.spec.modules}
        for name, matrix in self.residual.items():
            if modules.get(name) != matrix.shape:
                raise StateError(
                    f"residual of {name}: shape {matrix.shape}, expected {modules.get(name)}"
                )
        if self.round < 0:
            raise StateError(f"round={self.round} must be 0 or more")
        object.__setattr__(self, "residual", MappingProxyType(dict(self.residual)))
        object.__setattr__(self, "buffers", MappingProxyType(self._checked_buffers()))

    def exact(self, module: str) -> LowRank:
        """All that the rounds so far say about a module: the adapter's update and its residual."""
        kept = LowRank.of(self.adapter, module)
        return kept + self.residual[module] if module in self.residual else kept

    def _checked_buffers(self) -> dict[str, npt.NDArray[np.float64]]:
        checked = {}
        for name, value in self.buffers.items():
            array = np.array(value, dtype=np.float64, order="C")
            expected = self._buffer_shape(name)
            if array.shape != expected or not array.size:
                raise StateError(f"buffer {name}: shape {array.shape}, expected {expected}")
            if not np.isfinite(array).all():
                raise StateError(
                    f"buffer {name} has values that are NaN or infinite: the server optimiser has "
                    "diverged; choose a smaller server learning_rate"
                )
            array.flags.writeable = False
            checked[name] = array
        return checked

    def _buffer_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a buffer of this name must have; None if there is no such buffer."""
        match = _BUFFER.match(name)
        if match is None:
            return None
        what, place, factor = match.groups()
        if place is None:
            return (1,)
        if factor is None:
            layout = self.adapter.spec.layout
            return layout[place][2] if place in layout else None
        module = next((m for m in self.adapter.spec.modules if m.name == place), None)
        other = self.buffers.get(f"{what}/{place}/{'A' if factor == 'B' else 'B'}")
        if module is None or other is None or np.ndim(other) != 2:
            return None
        if factor == "B":
            return module.d_out, other.shape[0]
        return other.shape[1], module.d_in

    def to_bytes(self) -> bytes:
        """Safetensors bytes: the adapter as float32, the rest as float64; bit for bit."""
        tensors = {f"adapter/{key}": value for key, value in self.adapter}
        arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = dict(tensors)
        for name, matrix in self.residual.items():
            if matrix.rank:
                arrays[f"residual/{name}/B"] = matrix.B
                arrays[f"residual/{name}/A"] = matrix.A
        arrays |= {f"buffer/{name}": value for name, value in self.buffers.items()}
        note = {"schema": SCHEMA, "round": self.round, "spec": self.adapter.spec.to_json()}
        return tensor_file.save(arrays, json.dumps(note, sort_keys=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> GlobalState:
        """The inverse of :meth:`to_bytes`; bytes of schema 1, which had no buffers, are read too.

        Raises:
            StateError: if the bytes are cut short, damaged, or of another schema.
        """
        try:
            arrays, metadata = tensor_file.load(data, room=_ROOM)
            note = json.loads(metadata["format"])
            if note["schema"] not in _READABLE:
                raise StateError(f"state schema {note['schema']!r} is not one of {_READABLE}")
            spec = AdapterSpec.from_json(note["spec"])
            known = {key: arrays.pop(f"adapter/{key}") for key in spec.shapes()}
            residual = {}
            for module in spec.modules:
                left = arrays.pop(f"residual/{module.name}/B", None)
                if left is not None:
                    right = arrays.pop(f"residual/{module.name}/A")
                    residual[module.name] = LowRank(left, right)
            buffers = _buffers(arrays) if note["schema"] > 1 else {}
            if len(buffers) < len(arrays):
                known_buffers = {f"buffer/{name}" for name in buffers}
                raise StateError(f"unknown tensors: {sorted(arrays.keys() - known_buffers)[:3]}")
            return cls(Adapter(spec, known), residual, int(note["round"]), buffers)
        except StateError:
            raise
        except (AggregationError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"not a global state: {error}") from error


def _buffers(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float64]]:
    found = {}
    for key, value in arrays.items():
        if key.startswith("buffer/"):
            if value.dtype != np.float64:
                raise StateError(f"{key} is {value.dtype}, expected float64")
            found[key.removeprefix("buffer/")] = value
    return found


def initial_state(adapter: Adapter) -> GlobalState:
    """The state before the first round.

    Raises:
        StateError: if the adapter has values that are NaN or infinite.
    """
    if not adapter.is_finite():
        raise StateError("the initial adapter has values that are NaN or infinite")
    return GlobalState(adapter)
