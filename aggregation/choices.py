"""All choices of each of the eight pieces, by name. A further choice is a further line here.

>>> str(read("refactor", "svd(residual_rank=0)"))
'svd(residual_rank=0)'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aggregation.client_dp import ClientDp, ClientDpFtrl
from aggregation.codecs import CODECS
from aggregation.coordinate_rules import Bulyan, Median, TrimmedMean
from aggregation.distributing import Cut, Same, Truncate
from aggregation.errors import RecipeError
from aggregation.folding import Fresh, MeanResidual, SvdFold
from aggregation.index_mean import IndexMean
from aggregation.padded_mean import PaddedMean
from aggregation.piece import read_piece
from aggregation.pieces import FactorNoise, NoPrivacy
from aggregation.reducing import FactorMean, ProductSum, RankMean
from aggregation.refactoring import Keep, Svd
from aggregation.ridge import Ridge
from aggregation.robust import FLTrust, GeometricMedian, NormClip
from aggregation.robust_rules import Krum, MultiKrum
from aggregation.secure_pieces import SecureClientDdp, SecureClientDp, SecureSum
from aggregation.sent_mean import SentMean
from aggregation.server_adaptive import FedAdagrad, FedAdam, FedYogi
from aggregation.server_optimizer import Momentum, Sgd
from aggregation.sketching import Sketch
from aggregation.sparse import Sparse
from aggregation.train import (
    Aligned,
    Alternate,
    AlternateSelect,
    Both,
    Core,
    OnlyB,
    Overlay,
    RandomRanks,
    ShareA,
)
from aggregation.weighing import ByExamples, Frobenius, Staleness, Uniform

CHOICES: Mapping[str, tuple[type[Any], ...]] = {
    "train": (
        Both,
        OnlyB,
        Alternate,
        AlternateSelect,
        RandomRanks,
        Core,
        Aligned,
        ShareA,
        Overlay,
    ),
    "codec": CODECS,
    "weigh": (
        ByExamples,
        Uniform,
        Frobenius,
        Staleness,
    ),
    "reduce": (
        ProductSum,
        FactorMean,
        RankMean,
        PaddedMean,
        IndexMean,
        SentMean,
        Sketch,
        GeometricMedian,
        Krum,
        MultiKrum,
        FLTrust,
        NormClip,
        Median,
        TrimmedMean,
        Bulyan,
    ),
    "private": (
        NoPrivacy,
        FactorNoise,
        ClientDp,
        ClientDpFtrl,
        SecureSum,
        SecureClientDp,
        SecureClientDdp,
    ),
    "optimise": (
        Sgd,
        Momentum,
        FedAdam,
        FedYogi,
        FedAdagrad,
    ),
    "refactor": (
        Svd,
        Keep,
        SvdFold,
        MeanResidual,
        Fresh,
        Ridge,
    ),
    "distribute": (
        Truncate,
        Same,
        Cut,
        Sparse,
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
