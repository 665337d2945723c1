"""Rotating a client's factors towards a common reference before they are averaged: FedRot-LoRA.

(B R, R^T A) is the same update as (B, A) for every rotation R, and training wanders among them.
FedRot-LoRA (2602.23638) has each client turn its factors as close as possible to the adapter that
all of them started from, so that a plain mean of factors misses less. It costs no byte, the mean
stays linear, and what a client sends means exactly what it trained.

    >>> import numpy as np
    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 3, 3, rank=2, alpha=16.0),))
    >>> key_a, key_b = spec.modules[0].keys
    >>> start = Adapter(spec, {key_a: np.eye(2, 3), key_b: np.eye(3, 2)})
    >>> turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    >>> turned = Adapter(spec, {key_a: turn.T @ np.eye(2, 3), key_b: np.eye(3, 2) @ turn})
    >>> back = align(turned, start, "A", softness=1.0)
    >>> bool(np.allclose(back.factors("query")[0], start.factors("query")[0], atol=1e-6))
    True
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.low_rank import Array

# Weight of the identity, relative to the largest singular value: decides only where nothing else
# does (a reference of lower rank), in favour of not turning.
_TIE = 1e-10


class AlignError(AggregationError):
    """Adapters that cannot be aligned with each other."""


def align(adapter: Adapter, reference: Adapter, towards: str, softness: float = 0.5) -> Adapter:
    """The same update in factors that lie closer to a reference's.

    Args:
        adapter: to turn.
        reference: what to turn towards, usually the start of the round; of the same specification.
        towards: the factor that is compared, ``A`` or ``B``; both factors turn. The paper takes A
            in one round and B in the next.
        softness: the paper's lambda: 0 turns nothing, 1 by the whole Procrustes rotation.

    Returns:
        An adapter whose products are the same up to rounding; the very same one for softness 0,
        and untouched modules where the reference's factor is zero, which has no direction.

    Raises:
        AlignError: if the specifications differ, or an argument is out of range.
    """
    if adapter.spec != reference.spec:
        raise AlignError("adapter and reference have other specifications; align equal ones only")
    if towards not in ("A", "B"):
        raise AlignError(f"towards={towards!r} must be 'A' or 'B'")
    if not 0 <= softness <= 1:
        raise AlignError(f"softness={softness} must lie in 0 (no turn) to 1 (the whole rotation)")
    if softness == 0:
        return adapter
    tensors: dict[str, npt.NDArray[np.floating]] = dict(adapter.tensors)
    for module in adapter.spec.modules:
        left, right = (x.astype(np.float64) for x in adapter.factors(module.name))
        aim_left, aim_right = (x.astype(np.float64) for x in reference.factors(module.name))
        overlap = aim_right @ right.T if towards == "A" else aim_left.T @ left
        if not overlap.any():
            continue
        turn = rotation(overlap, softness)
        key_a, key_b = module.keys
        tensors[key_a], tensors[key_b] = turn.T @ right, left @ turn
    return Adapter(adapter.spec, tensors)


def rotation(overlap: Array, softness: float) -> Array:
    """The rotation R that brings ``B R`` and ``R^T A`` towards a reference.

    With the overlap ``M = A_ref A^T`` (or ``B_ref^T B``) ``= U S V^T``, the orthogonal Procrustes
    problem is solved by ``V U^T``, or ``V diag(1, .., 1, -1) U^T`` if that is a reflection: only
    proper rotations can be reached from the identity, and a reflection half of the way is singular.
    Then ``(1 - softness) I + softness R`` is projected back to the rotations, by the same formula.

    Args:
        overlap: M, of shape (r, r), not zero.
        softness: 0 to 1.

    Returns:
        An orthogonal matrix of shape (r, r) and determinant 1.
    """
    identity = np.eye(len(overlap))
    tie = _TIE * float(np.linalg.norm(overlap, 2))
    turn = _nearest(overlap.T + tie * identity)
    if softness == 1:
        return turn
    return _nearest((1 - softness) * identity + softness * turn)


def _nearest(matrix: Array) -> Array:
    """The rotation nearest to a matrix, in the Frobenius norm."""
    left, _, right = np.linalg.svd(matrix)
    if np.linalg.det(left @ right) < 0:
        left[:, -1] *= -1
    return np.asarray(left @ right)
