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
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from aggregation import tensor_file
from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.low_rank import LowRank
from aggregation.spec import AdapterSpec

SCHEMA = 1


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

    Raises:
        StateError: if a residual belongs to no module, or has another shape.
    """

    adapter: Adapter
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    round: int = 0

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

    def exact(self, module: str) -> LowRank:
        """All that the rounds so far say about a module: the adapter's update and its residual."""
        kept = LowRank.of(self.adapter, module)
        return kept + self.residual[module] if module in self.residual else kept

    def to_bytes(self) -> bytes:
        """Safetensors bytes: the adapter as float32, residuals as float64; bit for bit."""
        tensors = {f"adapter/{key}": value for key, value in self.adapter}
        arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = dict(tensors)
        for name, matrix in self.residual.items():
            if matrix.rank:
                arrays[f"residual/{name}/B"] = matrix.B
                arrays[f"residual/{name}/A"] = matrix.A
        note = {"schema": SCHEMA, "round": self.round, "spec": self.adapter.spec.to_json()}
        return tensor_file.save(arrays, json.dumps(note, sort_keys=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> GlobalState:
        """The inverse of :meth:`to_bytes`.

        Raises:
            StateError: if the bytes are cut short, damaged, or of another schema.
        """
        try:
            arrays, metadata = tensor_file.load(data)
            note = json.loads(metadata["format"])
            if note["schema"] != SCHEMA:
                raise StateError(f"state schema {note['schema']!r} is not {SCHEMA}")
            spec = AdapterSpec.from_json(note["spec"])
            known = {key: arrays.pop(f"adapter/{key}") for key in spec.shapes()}
            residual = {}
            for module in spec.modules:
                left = arrays.pop(f"residual/{module.name}/B", None)
                if left is not None:
                    right = arrays.pop(f"residual/{module.name}/A")
                    residual[module.name] = LowRank(left, right)
            if arrays:
                raise StateError(f"unknown tensors: {sorted(arrays)[:3]}")
            return cls(Adapter(spec, known), residual, int(note["round"]))
        except StateError:
            raise
        except (AggregationError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"not a global state: {error}") from error


def initial_state(adapter: Adapter) -> GlobalState:
    """The state before the first round.

    Raises:
        StateError: if the adapter has values that are NaN or infinite.
    """
    if not adapter.is_finite():
        raise StateError("the initial adapter has values that are NaN or infinite")
    return GlobalState(adapter)
