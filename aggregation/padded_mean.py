"""The reduce piece for clients of several ranks that all hold a prefix of the global factors.

:class:`PaddedMean` is HetLoRA's mean over zero-padded factors. What it costs: an index that only a
share q of the weight holds is averaged with the zeros of the others in *both* factors, so as
published its product shrinks by q^2 in every round, even if nobody learns anything. The delta form
pads the *changes* with zeros instead, and then nothing shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.low_rank import Array
from aggregation.piece import Reduce
from aggregation.reducing import Accumulator, Factors, ProductSum, Reduced
from aggregation.spec import AdapterSpec


@dataclass(frozen=True)
class PaddedMean(Reduce):
    """Reduce: the weighted mean of the factors, each padded with zeros to the global rank.

    HetLoRA (Cho et al. 2024, 2401.06432), section 3.2: ``B = sum p_k pad(B_k)`` and the same for A.
    Column j of a client's B means column j of the global one, so clients must have been handed the
    first r_k indices (distribute=cut). Scales differ between ranks: B_k counts as
    ``(s_k / s) B_k``, in the units of the global B.

    With ``delta`` the changes are padded and not the factors: an index that nobody trains keeps its
    value, and late updates mean what they say. Without it, it is the paper's mean, in which index j
    shrinks by (share of the weight that holds j)^2 a round.

    The paper's self-pruning, by which clients regularise their tail ranks away and return with a
    smaller rank, is left out: it is a term of the clients' loss and a second meaning of rank, which
    here is what a device says it can hold.

    Attributes:
        delta: whether changes are padded, or the factors as published.
    """

    kind = "padded-mean"
    factors = True
    linear = True
    weighted = True
    mixed_ranks = True
    delta: bool = True

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum; ``measure`` adds the exact products, for the report."""
        return _PaddedSum(spec, measure)


class _PaddedSum:
    def __init__(self, spec: AdapterSpec, measure: bool) -> None:
        self._spec = spec
        self._sums = {key: np.zeros(shape) for key, shape in spec.shapes().items()}
        self._exact = ProductSum().accumulator(spec, measure=True) if measure else None

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        for module in self._spec.modules:
            key_a, key_b = module.keys
            for one, signed in ((adapter, weight), (start, -weight)):
                left, right = padded(one, self._spec, module.name)
                self._sums[key_b][:, : left.shape[1]] += signed * left
                self._sums[key_a][: right.shape[0]] += signed * right
        for tensor in self._spec.others:
            change = np.subtract(
                adapter.tensors[tensor.key], start.tensors[tensor.key], dtype=np.float64
            )
            self._sums[tensor.key] += weight * change
        if self._exact is not None:
            self._exact.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        means = {key: running / total for key, running in self._sums.items()}
        factors: dict[str, Factors] = {}
        for module in self._spec.modules:
            key_a, key_b = module.keys
            factors[module.name] = means[key_b], means[key_a]
        products = self._exact.finish(total).products if self._exact is not None else {}
        return Reduced(products, factors, {t.key: means[t.key] for t in self._spec.others})


def padded(adapter: Adapter, spec: AdapterSpec, module: str) -> tuple[Array, Array]:
    """One module's factors in the units of another specification, whose first indices they are.

    Args:
        adapter: of a rank of at most that of ``spec``.
        spec: of the global adapter.
        module: name of the module.

    Returns:
        (B times the ratio of the scales, A), float64, at the adapter's own rank: whoever adds them
        up adds to a prefix, which is the padding with zeros.
    """
    left, right = adapter.factors(module)
    ratio = adapter.spec.scale(module) / spec.scale(module)
    return np.multiply(left, ratio, dtype=np.float64), right.astype(np.float64)
