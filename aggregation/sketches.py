"""What a client computes for a sketched mean: two thin products, see :mod:`aggregation.sketching`.

>>> import numpy as np
>>> from aggregation.init import initial_adapter
>>> from aggregation.spec import AdapterSpec, ModuleSpec
>>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
>>> start = initial_adapter(spec, seed=1)
>>> first_pass(start, start, columns=3, seed=0, number=1)["query"].shape
(4, 3)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.low_rank import Array, LowRank
from aggregation.spec import AdapterSpec, ModuleSpec

Sketches = Mapping[str, npt.NDArray[np.float32]]


def omega(module: ModuleSpec, columns: int, seed: int, number: int) -> Array:
    """The Gaussian matrix of one module and round, float64 of shape (d_in, columns).

    Args:
        module: its name enters the draw.
        columns: how many.
        seed: public seed of the run.
        number: of the round.
    """
    text = f"sketch:{seed}:{number}:{module.name}"
    source = np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
    return np.random.Generator(source).standard_normal((module.d_in, columns))


def first_pass(
    adapter: Adapter, start: Adapter, columns: int, seed: int, number: int
) -> dict[str, npt.NDArray[np.float32]]:
    """What a client sends first: ``s (B (A Omega) - B0 (A0 Omega))`` of every module.

    Args:
        adapter: after training.
        start: before it.
        columns: ``Assignment.sketch``; no more than the matrix has are used.
        seed: ``Assignment.seed``.
        number: of the round.

    Returns:
        By module, float32 of shape (d_out, columns). No weight is in it.

    Raises:
        AggregationError: if the two adapters have other shapes, or there are no columns.
    """
    if columns < 1:
        raise AggregationError(f"a sketch of {columns} columns says nothing; give at least 1")
    sketches = {}
    for module in adapter.spec.modules:
        draw = omega(module, columns_of(module, columns), seed, number)
        change = _change(adapter, start, module.name)
        sketches[module.name] = (change.B @ (change.A @ draw)).astype(np.float32)
    return sketches


def second_pass(
    adapter: Adapter, start: Adapter, basis: Sketches
) -> dict[str, npt.NDArray[np.float32]]:
    """What a client sends second: ``s (A^T (B^T Q) - A0^T (B0^T Q))`` of every module.

    Args:
        adapter: after training, as in the first pass.
        start: before it.
        basis: Q by module, float32 of shape (d_out, l).

    Returns:
        By module, float32 of shape (d_in, l). No weight is in it.

    Raises:
        AggregationError: if the basis is not of this adapter's modules and shapes.
    """
    sketches = {}
    for module in adapter.spec.modules:
        found = basis.get(module.name)
        if found is None or found.ndim != 2 or found.shape[0] != module.d_out:
            shape = None if found is None else found.shape
            raise AggregationError(
                f"module {module.name}: the basis has shape {shape}, expected ({module.d_out}, l)"
            )
        change = _change(adapter, start, module.name)
        sketches[module.name] = (change.A.T @ (change.B.T @ found)).astype(np.float32)
    return sketches


def sketch_shapes(spec: AdapterSpec, columns: int) -> dict[str, tuple[int, int]]:
    """Shapes of the first pass by module, for whoever checks what came."""
    return {m.name: (m.d_out, columns_of(m, columns)) for m in spec.modules}


def _change(adapter: Adapter, start: Adapter, module: str) -> LowRank:
    """``s (B A - B0 A0)`` as ``s (dB A + B0 dA)``: zero to the last bit if nothing has changed."""
    left, right = (f.astype(np.float64) for f in adapter.factors(module))
    left0, right0 = (f.astype(np.float64) for f in start.factors(module))
    if left.shape != left0.shape:
        raise AggregationError(
            f"module {module}: rank {left.shape[1]}, and it started with {left0.shape[1]}"
        )
    scale = adapter.spec.scale(module)
    return LowRank(scale * np.hstack([left - left0, left0]), np.vstack([right, right - right0]))


def columns_of(module: ModuleSpec, columns: int) -> int:
    """How many columns a module's sketch has: no more than its matrix has rows or columns."""
    return min(columns, module.d_out, module.d_in)
