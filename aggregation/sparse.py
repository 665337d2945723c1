"""The distribute piece for thin links down: only the largest entries of the global factors.

>>> str(Sparse()), str(Sparse(density=0.1))
('sparse', 'sparse(density=0.1)')
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.errors import RecipeError
from aggregation.index_coding import largest
from aggregation.piece import Piece
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState


@dataclass(frozen=True)
class Sparse(Piece):
    """Distribute: the factors with all but their largest entries set to zero.

    FLASC (Kuo et al. 2024, 2406.05233), section 3: the server keeps the dense adapter and sends
    its top entries by magnitude, over the flattened factors of all modules together; the client
    trains *all* entries from there, and sends the top entries of its change (codec=top-k). Its
    change counts from what it was handed, so entries that were not handed out keep what they are
    on the server, and a round in which nobody learns changes nothing.

    Tensors outside the modules go down whole: a head has few values, and zeros in it are answers.

    Attributes:
        density: share of the factors' entries that are handed out; above 0 and at most 1.

    Raises:
        RecipeError: if it is out of its bounds.
    """

    kind = "sparse"
    mixed_ranks = False
    density: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise RecipeError(f"sparse: density={self.density} must be above 0 and at most 1")

    def adapter(self, state: GlobalState, spec: AdapterSpec) -> Adapter:
        """What every client loads.

        Raises:
            RecipeError: if the client's specification is not the global adapter's.
        """
        if spec != state.adapter.spec:
            raise RecipeError(
                "a client has other ranks or alphas than the global adapter, and distribute=sparse "
                "hands out entries of one for all; choose distribute=cut or distribute=truncate"
            )
        inside = [key for module in spec.modules for key in module.keys]
        tensors = dict(state.adapter.tensors)
        if not inside:
            return state.adapter
        flat = np.concatenate([tensors[key].ravel() for key in inside])
        kept = np.zeros_like(flat)
        places = largest(flat, max(1, math.ceil(self.density * len(flat) - 1e-9)))
        kept[places] = flat[places]
        first = 0
        for key in inside:
            last = first + tensors[key].size
            tensors[key] = kept[first:last].reshape(tensors[key].shape)
            first = last
        return Adapter(spec, tensors)
