"""What a recipe keeps beside the trainable adapter, as further adapters: frozen, and small enough.

The residual of a state is a low-rank matrix per module. Loaded beside the trainable adapter and
added to it, it makes the exact global update whole. PEFT takes no rank above ``MAX_RANK``, so a
wider residual becomes several adapters.

    >>> import numpy as np
    >>> from aggregation.init import initial_adapter
    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> rest = LowRank(np.eye(4)[:, :3], np.eye(8)[:3])
    >>> (adapter,) = residual_adapters(GlobalState(initial_adapter(spec, seed=1), {"query": rest}))
    >>> adapter.spec.module("query").rank, adapter.spec.scale("query")
    (3, 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.low_rank import LowRank
from aggregation.spec import MAX_RANK, AdapterSpec, ModuleSpec
from aggregation.state import GlobalState

# Residual directions below this share of a module's update are rounding: adapters are float32.
ROUNDING = 1e-9
FOLDER = "residual"


class StackError(AggregationError):
    """Adapters that no single one can stand for; says which module, and what to do instead."""


def residual_adapters(state: GlobalState) -> tuple[Adapter, ...]:
    """The residual as adapters of scale 1 without a head, to be applied beside the trainable one.

    Args:
        state: after a round; its residual may be empty.

    Returns:
        As few as hold it at a rank of at most ``MAX_RANK``; none if nothing is left.
    """
    rest: dict[str, LowRank] = {}
    for name, matrix in state.residual.items():
        left, values, right = matrix.svd()
        keep = int((values > ROUNDING * state.exact(name).norm()).sum())
        if keep:
            root = values[:keep] ** 0.5
            rest[name] = LowRank(left[:, :keep] * root, root[:, None] * right[:keep])
    adapters = []
    spec = state.adapter.spec
    for first in range(0, max((m.rank for m in rest.values()), default=0), MAX_RANK):
        modules: list[ModuleSpec] = []
        tensors = {}
        for name, matrix in rest.items():
            left, right = matrix.B[:, first : first + MAX_RANK], matrix.A[first : first + MAX_RANK]
            if len(right):
                module = replace(spec.module(name), rank=len(right), alpha=float(len(right)))
                modules.append(module)
                key_a, key_b = module.keys
                tensors[key_a], tensors[key_b] = right, left
        # No task and no head: those are the trainable adapter's.
        adapters.append(Adapter(AdapterSpec(spec.base_digest, tuple(modules)), tensors))
    return tuple(adapters)


def folder_name(index: int) -> str:
    """Folder of an adapter beside, inside that of the trainable one: residual, residual-2, ..."""
    return f"{FOLDER}-{index + 1}" if index else FOLDER


def files(beside: Sequence[Adapter], base_name: str, *, with_spec: bool = True) -> dict[str, bytes]:
    """The PEFT folders of adapters beside, as files of the trainable one's folder.

    Args:
        beside: the adapters.
        base_name: public name of the base model.
        with_spec: whether the digest of the base is known, see ``peft_layout.write``.

    Raises:
        LayoutError: if ``base_name`` is a path.
    """
    return {
        f"{folder_name(index)}/{file}": data
        for index, adapter in enumerate(beside)
        for file, data in peft_layout.contents(adapter, base_name, with_spec=with_spec).items()
    }


def read(folder: Path, *, base_digest: str | None = None) -> tuple[Adapter, ...]:
    """The adapters that lie beside the trainable one in its folder; none if there is no residual.

    Args:
        folder: of the trainable adapter.
        base_digest: for folders without ``airpeft.json``, see ``peft_layout.read``.

    Raises:
        LayoutError: if one of them is not a readable adapter.
    """
    found: list[Adapter] = []
    while (place := folder / folder_name(len(found))).is_dir():
        found.append(peft_layout.read(place, base_digest=base_digest))
    return tuple(found)


def stacked(adapter: Adapter, beside: Sequence[Adapter]) -> Adapter:
    """One adapter that does what the trainable one and those beside it do together, losslessly.

    Factors are stacked with the scales folded in, so nothing is multiplied out or rounded away:
    ``s B A + sum s_j B_j A_j = [s B, s_1 B_1, ...] [A; A_1; ...]`` at a scale of 1.

    Args:
        adapter: the trainable one; its head and labels stay.
        beside: frozen ones, of the same base and with no other modules.

    Raises:
        StackError: if a module's ranks add up to more than an adapter may have or its matrix can
            use, or an adapter beside belongs to something else.
    """
    if not beside:
        return adapter
    spec = adapter.spec
    _check_beside(spec, beside)
    modules, tensors = [], dict(adapter.tensors)
    for module in spec.modules:
        whole = LowRank.of(adapter, module.name)
        for extra in beside:
            if any(m.name == module.name for m in extra.spec.modules):
                whole += LowRank.of(extra, module.name)
        most = min(MAX_RANK, module.d_in, module.d_out)
        if whole.rank > most:
            whole = whole.compress(ROUNDING)
            if whole.rank > most:
                raise StackError(
                    f"module {module.name}: the adapter and what is beside it have rank "
                    f"{whole.rank} together, and an adapter of it may have {most}; train with "
                    "recipe svd-warm-start, which keeps nothing beside, or with fewer clients, "
                    "rounds or ranks"
                )
        if not whole.rank:  # nothing learnt yet
            whole = LowRank.of(adapter, module.name)
        stack = replace(module, rank=whole.rank, alpha=float(whole.rank))
        modules.append(stack)
        key_a, key_b = stack.keys
        tensors[key_b], tensors[key_a] = whole.B, whole.A
    return Adapter(replace(spec, modules=tuple(modules), use_rslora=False), tensors)


def _check_beside(spec: AdapterSpec, beside: Sequence[Adapter]) -> None:
    shapes = {m.name: (m.d_out, m.d_in, m.orientation) for m in spec.modules}
    for extra in beside:
        if extra.spec.base_digest != spec.base_digest:
            raise StackError(
                f"an adapter beside is for base {extra.spec.base_digest}, expected "
                f"{spec.base_digest}"
            )
        if extra.spec.others:
            raise StackError(
                f"an adapter beside has the tensor {extra.spec.others[0].name}; only the trainable "
                "one may have a head"
            )
        for m in extra.spec.modules:
            if shapes.get(m.name) != (m.d_out, m.d_in, m.orientation):
                raise StackError(f"an adapter beside has module {m.name}, which does not fit")
