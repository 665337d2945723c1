"""All choices of each of the eight pieces, by name. A further choice is a further line here.

>>> str(read("refactor", "svd(residual_rank=0)"))
'svd(residual_rank=0)'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aggregation.distributing import Same, Truncate
from aggregation.errors import RecipeError
from aggregation.folding import Fresh, MeanResidual, SvdFold
from aggregation.piece import read_piece
from aggregation.pieces import ByExamples, Float32, NoPrivacy, Uniform
from aggregation.reducing import FactorMean, ProductSum, RankMean
from aggregation.refactoring import Keep, Svd
from aggregation.robust import GeometricMedian
from aggregation.server_optimizer import Sgd
from aggregation.train import Alternate, Both, OnlyB

CHOICES: Mapping[str, tuple[type[Any], ...]] = {
    "train": (
        Both,
        OnlyB,
        Alternate,
    ),
    "codec": (Float32,),
    "weigh": (
        ByExamples,
        Uniform,
    ),
    "reduce": (
        ProductSum,
        FactorMean,
        RankMean,
        GeometricMedian,
    ),
    "private": (NoPrivacy,),
    "optimise": (Sgd,),
    "refactor": (
        Svd,
        Keep,
        SvdFold,
        MeanResidual,
        Fresh,
    ),
    "distribute": (
        Truncate,
        Same,
    ),
}


def read(piece: str, text: str) -> Any:
    """A choice of a piece as it is written: ``int8``, or ``svd(residual_rank=0, energy=0.9)``.

    Raises:
        RecipeError: if there is no such piece, choice or setting, or a value is not allowed.
    """
    if piece not in CHOICES:
        raise RecipeError(f"a recipe has no piece {piece!r}; it has {', '.join(CHOICES)}")
    return read_piece(text, {kind.kind: kind for kind in CHOICES[piece]}, piece)
