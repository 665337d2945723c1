"""The public basis of Fed-SB: B = left R and A = right, where only the r x r core R is trained.

Fed-SB (2502.15436, section 4) adapts a weight by s B R A with B and A frozen and the same for all,
so that the mean of the cores is the core of the mean, exactly, and r x r numbers travel. Where we
differ: its B and A (those of LoRA-SB) are singular vectors of a gradient on somebody's data, which
are sent to everybody; here they come from a public seed and tell nothing of anybody. What a random
basis costs in quality must be made up for by a larger rank. R starts at 0, where LoRA-SB starts it
at the singular values.

A row of the basis is one of a discrete cosine transform with random signs,
``sqrt(2 / d) cos(pi (2 i + 1) k / (2 d)) sign_i`` with k drawn without replacement (a subsampled
randomised trigonometric transform: Halko, Martinsson and Tropp 2011, section 4.6, where it is used
as here, in place of a Gaussian matrix). It is orthonormal by construction, needs no
decomposition, and the basis of a smaller rank is a part of that of a larger one.

Everything below uses only integers and IEEE additions, multiplications and square roots, in a
fixed order, so that every machine gets the same bits: server and clients each make the basis and
put cores into it on their own, and compare adapters by digest.

    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> cores = {"query": np.array([[1.0, 0.5], [0.0, -2.0]])}
    >>> core_of(with_core(spec, cores, 7), 7)["query"].tolist()
    [[1.0, 0.5], [0.0, -2.0]]
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.low_rank import Array
from aggregation.spec import AdapterSpec

# Cores have 22 bits below the largest entry of their module. The step from one side of this
# boundary to the other, where a bit is gained, lies between two multiples of the step itself.
_BITS = 22
_BOUNDARY = (2.0**_BITS - 5.5) / 2.0**_BITS


class CoreError(AggregationError):
    """Cores that do not fit their adapter."""


def basis(spec: AdapterSpec, seed: int) -> dict[str, tuple[Array, Array]]:
    """The frozen factors of every module.

    Args:
        spec: shapes and ranks.
        seed: public, any integer; each module has its own stream, derived from it and its name.

    Returns:
        By module, (left, right): float64 of shape (d_out, r) with orthonormal columns, and of shape
        (r, d_in) with orthonormal rows. Those of a smaller rank are their first columns and rows.
    """
    return {
        m.name: (
            _rows(f"{seed}:left:{m.name}", m.rank, m.d_out).T,
            _rows(f"{seed}:right:{m.name}", m.rank, m.d_in),
        )
        for m in spec.modules
    }


def core_of(adapter: Adapter, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """The cores of an adapter in the basis of a seed: the R nearest to ``left R = B``.

    They are rounded to 22 bits below the largest entry of their module (2^-23 of it at most, which
    is what the float32 values of B hold of it), so that putting them back into the basis gives an
    adapter with exactly these cores.

    Returns:
        By module, float32 of shape (r, r).
    """
    cores = {}
    for name, (left, _) in basis(adapter.spec, seed).items():
        cores[name] = _rounded(left.T @ adapter.factors(name)[0].astype(np.float64))
    return cores


def with_core(
    spec: AdapterSpec,
    cores: Mapping[str, npt.NDArray[Any]],
    seed: int,
    others: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Adapter:
    """The adapter with these cores: B = left R, A = right.

    Args:
        spec: of the adapter.
        cores: by module, of shape (r, r).
        seed: of the basis.
        others: the tensors outside the modules, by name; what is not there is zero.

    Raises:
        CoreError: if a core is missing, unknown or of another shape.
    """
    others = others or {}
    odd = sorted(cores.keys() ^ {m.name for m in spec.modules})
    if odd:
        raise CoreError(f"cores are missing or unknown for modules {odd[:3]}")
    tensors: dict[str, npt.NDArray[Any]] = {
        t.key: others.get(t.key, np.zeros(t.shape, np.float32)) for t in spec.others
    }
    frames = basis(spec, seed)
    for module in spec.modules:
        core = np.asarray(cores[module.name], np.float64)
        if core.shape != (module.rank, module.rank):
            raise CoreError(
                f"core of {module.name}: shape {core.shape}, expected {(module.rank,) * 2}"
            )
        left, right = frames[module.name]
        key_a, key_b = module.keys
        tensors[key_a], tensors[key_b] = right, _times(left, core)
    return Adapter(spec, tensors)


def settle(adapter: Adapter, seed: int) -> Adapter:
    """The adapter of the basis that is nearest to this one, down to the bits of its cores.

    One whose B is zero applies the same as before: nothing. A mean of adapters of the basis moves
    by rounding only. Any other loses what lies outside of the basis.
    """
    return with_core(adapter.spec, core_of(adapter, seed), seed, adapter.tensors)


def enter(adapter: Adapter, seed: int) -> Adapter:
    """The adapter that a run in the basis starts from: :func:`settle`, if that loses nothing.

    Raises:
        CoreError: if the adapter applies something already and is not of this basis.
    """
    settled = settle(adapter, seed)
    for module in adapter.spec.modules:
        left, right = adapter.factors(module.name)
        if left.any() and not np.array_equal(right, settled.factors(module.name)[1]):
            raise CoreError(
                f"module {module.name} has an A that is not of the public basis of seed {seed}, "
                "and its update would be lost in it; start train=core from a new adapter (B = 0) "
                "or from one of the same seed"
            )
    return settled


def _rows(name: str, rank: int, width: int) -> Array:
    """The first ``rank`` rows of a random orthonormal basis of ``width`` dimensions."""
    word = hashlib.sha256(f"airpeft.core:{name}".encode()).digest()
    # The raw stream is fixed by the generator's definition; what NumPy makes of it is not.
    draw = np.random.PCG64(int.from_bytes(word[:16], "big")).random_raw(2 * width)
    frequencies = np.argsort(draw[:width], kind="stable")[:rank]
    signs = np.where(draw[width:] >> np.uint64(63), -1.0, 1.0)
    # cos(pi m / (2 width)) has period 4 width in m.
    angles = (2 * np.arange(width) + 1) * frequencies[:, None] % (4 * width)
    scale = np.where(frequencies == 0, math.sqrt(1.0 / width), math.sqrt(2.0 / width))
    return np.asarray(_cosine(width)[angles] * signs * scale[:, None])


def _cosine(width: int) -> Array:
    """cos(pi m / (2 width)) for m = 0 .. 4 width - 1, from power series in the first eighth."""
    m = np.arange(width + 1)
    small = np.minimum(m, width - m) * (math.pi / (2 * width))
    square = small * small
    even, odd = np.ones(width + 1), np.ones(width + 1)
    for n in range(18, 0, -2):  # the term of order 18 is below 1e-17 at pi / 4
        even = 1.0 - square / float((n - 1) * n) * even
        odd = 1.0 - square / float(n * (n + 1)) * odd
    quarter = np.where(2 * m <= width, even, small * odd)  # cos x, or sin(pi / 2 - x)
    half = np.concatenate([quarter, -quarter[-2::-1]])
    return np.concatenate([half, half[-2:0:-1]])


def _times(left: Array, core: Array) -> Array:
    """``left @ core``, in an order that does not depend on a library."""
    product = np.zeros((left.shape[0], core.shape[1]))
    for k in range(core.shape[0]):
        product += left[:, k : k + 1] * core[k]
    return product


def _rounded(core: Array) -> npt.NDArray[np.float32]:
    """Multiples of a power of two, 22 bits below the largest entry."""
    largest = float(np.max(np.abs(core)))
    if largest < np.finfo(np.float32).tiny:  # nothing but rounding
        return np.zeros(core.shape, np.float32)
    step = math.ldexp(1.0, math.frexp(largest / _BOUNDARY)[1] - _BITS)
    return (np.round(core / step) * step + 0.0).astype(np.float32)  # no negative zeros
