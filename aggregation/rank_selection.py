"""Which rank indices of an adapter a client trains or sends: the most important, or a random share.

Index j of a module is the pair of column j of B and row j of A; the product is the sum over them,
``s B A = s sum_j B[:, j] A[j, :]``. A choice is a boolean mask per module. The choice by importance
is made over *all* modules at once, so that a module that matters gets more than one that does not.

    >>> import numpy as np
    >>> masks = select({"query": np.array([3.0, 0.1]), "value": np.array([0.2, 2.0])}, share=0.5)
    >>> {name: mask.tolist() for name, mask in masks.items()}
    {'query': [True, False], 'value': [False, True]}
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.low_rank import Array
from aggregation.spec import AdapterSpec

Mask = npt.NDArray[np.bool_]


def importance(adapter: Adapter, start: Adapter) -> dict[str, Array]:
    """How much each rank index has changed its module's update.

    For index j of a module with scale s this is
    ``s || B[:, j] A[j, :] - B0[:, j] A0[j, :] ||_F``, from inner products and without a matrix. In
    a round that trains B alone it is ``s ||dB[:, j]|| ||A[j, :]||``, and in one that trains A alone
    ``s ||B[:, j]|| ||dA[j, :]||``: the criterion S of LoRA-A2 (2410.22815). There the scale is the
    same everywhere; ours counts each module's own, since what is compared across modules is the
    change of the model.

    Args:
        adapter: after training.
        start: before it; of the same specification.

    Returns:
        By module, float64 of shape (r,), 0 or more.

    Raises:
        AggregationError: if the two have other specifications.
    """
    if adapter.spec != start.spec:
        raise AggregationError(
            "importance compares an adapter with its own start; the two have other specifications"
        )
    scores = {}
    for module in adapter.spec.modules:
        left, right = (f.astype(np.float64) for f in adapter.factors(module.name))
        left0, right0 = (f.astype(np.float64) for f in start.factors(module.name))
        # B A - B0 A0 = dB A + B0 dA; in this form nothing large cancels.
        step_left, step_right = left - left0, right - right0
        squared = (
            _columns(step_left, step_left) * _rows(right, right)
            + _columns(left0, left0) * _rows(step_right, step_right)
            + 2.0 * _columns(step_left, left0) * _rows(right, step_right)
        )
        scores[module.name] = adapter.spec.scale(module.name) * np.sqrt(np.maximum(squared, 0.0))
    return scores


def select(scores: Mapping[str, Array], share: float) -> dict[str, Mask]:
    """The indices with the largest scores, over all modules together.

    Args:
        scores: by module, shape (r,).
        share: share of all indices to choose, above 0 and at most 1; at least one is chosen. Of
            equal scores the first is taken, in the order of the modules.

    Returns:
        By module, a mask of shape (r,).

    Raises:
        AggregationError: if the share is out of its bounds.
    """
    _check_share(share)
    if not scores:
        return {}
    flat = np.concatenate([np.asarray(score, np.float64) for score in scores.values()])
    chosen = np.zeros(len(flat), bool)
    count = max(1, math.floor(share * len(flat) + 0.5))
    chosen[np.argsort(-flat, kind="stable")[:count]] = True
    return _split(chosen, {name: len(score) for name, score in scores.items()})


def random_ranks(
    spec: AdapterSpec, share: float, seed: int, client: str, number: int
) -> dict[str, Mask]:
    """A random choice that anybody can repeat who knows the public seed: Fed-PLoRA (2602.16936).

    There each client draws r_k of the R rank-one modules of each weight anew in every round; here
    r_k is the share of R, rounded, and at least one.

    Args:
        spec: of the adapter.
        share: share of each module's indices, above 0 and at most 1.
        seed: public seed of the run.
        client: stable name of the client.
        number: of the round.

    Returns:
        By module, a mask of shape (r,).

    Raises:
        AggregationError: if the share is out of its bounds.
    """
    _check_share(share)
    masks = {}
    for module in spec.modules:
        text = f"ranks:{seed}:{number}:{client}:{module.name}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        order = np.random.Generator(np.random.PCG64(number)).permutation(module.rank)
        mask = np.zeros(module.rank, bool)
        mask[order[: max(1, math.floor(share * module.rank + 0.5))]] = True
        masks[module.name] = mask
    return masks


def keep_only(adapter: Adapter, start: Adapter, masks: Mapping[str, Mask]) -> Adapter:
    """The adapter with every index outside the masks back at its start, bit for bit.

    Args:
        adapter: after training; tensors outside the modules stay as they are.
        start: before it.
        masks: by module, the indices to keep.
    """
    tensors = dict(adapter.tensors)
    for module in adapter.spec.modules:
        mask = masks[module.name]
        key_a, key_b = module.keys
        tensors[key_a] = np.where(mask[:, None], adapter.tensors[key_a], start.tensors[key_a])
        tensors[key_b] = np.where(mask[None, :], adapter.tensors[key_b], start.tensors[key_b])
    return Adapter(adapter.spec, tensors)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise AggregationError(f"share={share} of the rank indices must be above 0 and at most 1")


def _split(chosen: Mask, ranks: Mapping[str, int]) -> dict[str, Mask]:
    masks, first = {}, 0
    for name, rank in ranks.items():
        masks[name] = chosen[first : first + rank]
        first += rank
    return masks


def _columns(one: Array, other: Array) -> Array:
    return np.asarray(np.einsum("or,or->r", one, other))


def _rows(one: Array, other: Array) -> Array:
    return np.asarray(np.einsum("ri,ri->r", one, other))
