"""The distribute piece: what a client loads, given its own ranks and alphas.

Whatever a client loads, times its own scale, is the global update or its best approximation at the
client's rank: scales are always divided out (alpha / r differs as soon as ranks differ).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import RecipeError
from aggregation.low_rank import LowRank
from aggregation.piece import Piece
from aggregation.refactoring import pad
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState


@dataclass(frozen=True)
class Same(Piece):
    """Distribute: every client gets the global adapter as it is."""

    kind = "same"
    mixed_ranks = False

    def adapter(self, state: GlobalState, spec: AdapterSpec) -> Adapter:
        """The global adapter.

        Raises:
            RecipeError: if the client's specification is another.
        """
        if spec != state.adapter.spec:
            raise RecipeError(
                "a client has other ranks or alphas than the global adapter, and distribute=same "
                "hands out one for all; choose distribute=Truncate() with reduce=ProductSum()"
            )
        return state.adapter


@dataclass(frozen=True)
class Truncate(Piece):
    """Distribute: the best approximation at the client's own rank, in the client's own scale."""

    kind = "truncate"
    mixed_ranks = True

    def adapter(self, state: GlobalState, spec: AdapterSpec) -> Adapter:
        """What a client with this specification loads.

        Raises:
            RecipeError: if the specification adapts other modules, or another base.
        """
        if spec == state.adapter.spec:
            return state.adapter
        check_kin(state.adapter.spec, spec)
        tensors: dict[str, npt.NDArray[np.floating]] = {}
        tensors |= {tensor.key: state.adapter.tensors[tensor.key] for tensor in spec.others}
        for module in spec.modules:
            left, right = state.adapter.factors(module.name)
            if module.rank < left.shape[1] and left.any():
                kept = LowRank.of(state.adapter, module.name).best(module.rank)
                wide_left, wide_right = kept.B / spec.scale(module.name), kept.A
            else:
                ratio = state.adapter.spec.scale(module.name) / spec.scale(module.name)
                wide_left = left[:, : module.rank].astype(np.float64) * ratio
                wide_right = right[: module.rank].astype(np.float64)
            new_left, new_right = pad(wide_left, wide_right, module.rank)
            key_a, key_b = module.keys
            tensors[key_a], tensors[key_b] = new_right, new_left
        return Adapter(spec, tensors)


@dataclass(frozen=True)
class Cut(Piece):
    """Distribute: the first r_k rank indices of the global factors, for a client of rank r_k.

    HetLoRA (2401.06432, section 3.2): ``A[:r_k]`` and ``B[:, :r_k]``, in an order that never
    changes, so that index j means the same to all who hold it; that is what a mean of factors over
    clients of several ranks needs. B is in the client's own scale, so what it applies is the sum
    of the global adapter's first r_k rank-one terms. It is not the best approximation of that rank,
    as :class:`Truncate` hands out, unless the factors happen to be in the order of an SVD.
    """

    kind = "cut"
    mixed_ranks = True

    def adapter(self, state: GlobalState, spec: AdapterSpec) -> Adapter:
        """What a client with this specification loads.

        Raises:
            RecipeError: if the specification adapts other modules or another base, or has a rank
                above the global one.
        """
        ours = state.adapter.spec
        if spec == ours:
            return state.adapter
        check_kin(ours, spec)
        tensors: dict[str, npt.NDArray[np.floating]] = {}
        tensors |= {tensor.key: state.adapter.tensors[tensor.key] for tensor in spec.others}
        for module in spec.modules:
            left, right = state.adapter.factors(module.name)
            if module.rank > len(right):
                raise RecipeError(
                    f"module {module.name}: a client of rank {module.rank} cannot get the first "
                    f"indices of a global adapter of rank {len(right)}; give it at most that rank"
                )
            ratio = ours.scale(module.name) / spec.scale(module.name)
            key_a, key_b = module.keys
            tensors[key_a] = right[: module.rank]
            tensors[key_b] = left[:, : module.rank].astype(np.float64) * ratio
        return Adapter(spec, tensors)


def check_kin(ours: AdapterSpec, theirs: AdapterSpec) -> None:
    """Two specifications may differ in ranks and scales only.

    Raises:
        RecipeError: naming what else differs.
    """
    difference = kinship(ours, theirs)
    if difference:
        raise RecipeError(f"a client's adapter does not fit the global one: {difference}")


def kinship(ours: AdapterSpec, theirs: AdapterSpec) -> str:
    """What differs between two specifications besides ranks and scales; empty if nothing."""
    mine = {m.name: (m.d_out, m.d_in, m.orientation) for m in ours.modules}
    other = {m.name: (m.d_out, m.d_in, m.orientation) for m in theirs.modules}
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            return f"module {name}: {_shape(other.get(name))}, expected {_shape(mine.get(name))}"
    if ours.others != theirs.others:
        return (
            f"tensors {[(t.name, t.shape) for t in theirs.others][:4]}, "
            f"expected {[(t.name, t.shape) for t in ours.others][:4]}"
        )
    if ours.peft_type != theirs.peft_type:
        return f"peft_type {theirs.peft_type}, expected {ours.peft_type}"
    if ours.settings != theirs.settings:
        return f"settings {dict(theirs.settings)}, expected {dict(ours.settings)}"
    return ""


def _shape(value: tuple[int, int, str] | None) -> str:
    return f"{value[0]} x {value[1]} ({value[2]})" if value else "not there"
