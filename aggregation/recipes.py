"""The recipes by name.

    >>> print(recipe("fedit"))
    fedit: both | float32 | examples | factor-mean | none | sgd | keep | same
    >>> print(recipe("fedit", {"weigh": "uniform"}).weigh)
    uniform

Adding one is adding an entry to ``RECIPES``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from aggregation.codecs import TopK
from aggregation.coordinate_rules import Bulyan, Median, TrimmedMean
from aggregation.distributing import Cut, Same
from aggregation.errors import RecipeError
from aggregation.folding import Fresh, MeanResidual, SvdFold
from aggregation.index_mean import IndexMean
from aggregation.padded_mean import PaddedMean
from aggregation.pieces import FactorNoise, Uniform
from aggregation.recipe import Recipe
from aggregation.reducing import FactorMean, ProductSum, RankMean
from aggregation.refactoring import Keep, Svd
from aggregation.ridge import Ridge
from aggregation.robust import FLTrust, GeometricMedian, NormClip
from aggregation.robust_rules import Krum, MultiKrum
from aggregation.server_adaptive import FedAdagrad, FedAdam, FedYogi
from aggregation.server_optimizer import Momentum
from aggregation.sketching import Sketch
from aggregation.sparse import Sparse
from aggregation.train import (
    Aligned,
    Alternate,
    AlternateSelect,
    Core,
    OnlyB,
    Overlay,
    RandomRanks,
    ShareA,
)
from aggregation.weighing import Frobenius, Staleness

DEFAULT = "svd-warm-start"
_ALL = (
    Recipe(
        DEFAULT,
        reference="delta form with exact low-rank SVD; refactoring as FedMomentum "
        "(2603.08014, residual kept unmerged), balance as FedSVD (2505.12805)",
    ),
    Recipe(
        "fedit",
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedIT (Zhang et al. 2023, 2305.05644), section 3",
    ),
    Recipe(
        "ffa-lora",
        train=OnlyB(),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="FFA-LoRA (Sun et al. 2024, 2403.12313), section 4",
    ),
    Recipe(
        "rolora",
        train=Alternate(),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="RoLoRA (2502.01755), algorithm 1",
    ),
    Recipe(
        "fedsa-lora",
        train=ShareA(),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedSA-LoRA (Guo et al. 2025, 2410.01463), section 3",
    ),
    Recipe(
        "feddpa",
        train=Overlay(),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedDPA (Long et al. 2024, 2403.19211), its variant -T",
    ),
    Recipe("flora", refactor=Fresh(), reference="FLoRA (Wang et al. 2024, 2409.05976)"),
    Recipe(
        "fedex-lora",
        reduce=FactorMean(),
        refactor=MeanResidual(),
        distribute=Same(),
        reference="FedEx-LoRA (Singhal et al. 2025, 2410.09432)",
    ),
    Recipe("fedmomentum", refactor=SvdFold(), reference="FedMomentum (2603.08014)"),
    Recipe(
        "flexlora",
        reduce=ProductSum(delta=False),
        refactor=Svd(residual_rank=0),
        reference="FlexLoRA (Bai et al. 2024, 2402.11505)",
    ),
    Recipe(
        "florist",
        reduce=ProductSum(delta=False),
        refactor=Svd(residual_rank=0, energy=0.9),
        reference="FLoRIST (2506.09199), section 3",
    ),
    Recipe(
        "raflora",
        reduce=RankMean(),
        refactor=Svd(residual_rank=0),
        reference="raFLoRA (2602.13486)",
    ),
    Recipe(
        "rfa",
        reduce=GeometricMedian(),
        reference="RFA (Pillutla et al. 2022, 1912.13445), algorithm 2, in product space",
    ),
    Recipe(
        "krum",
        weigh=Uniform(),
        reduce=Krum(),
        reference="Krum (Blanchard et al. 2017, 1703.02757), section 4, in product space",
    ),
    Recipe(
        "multi-krum",
        weigh=Uniform(),
        reduce=MultiKrum(),
        reference="Multi-Krum (Blanchard et al. 2017, 1703.02757), section 4, in product space",
    ),
    Recipe(
        "fltrust",
        weigh=Uniform(),
        reduce=FLTrust(),
        reference="FLTrust (Cao et al. 2021, 2012.13995), section 4, in product space",
    ),
    Recipe(
        "norm-clip",
        reduce=NormClip(),
        reference="norm clipping (Sun et al. 2019, 1911.07963), section 4, in product space",
    ),
    Recipe(
        "bulyan",
        train=OnlyB(),
        weigh=Uniform(),
        reduce=Bulyan(),
        refactor=Keep(),
        distribute=Same(),
        reference="Bulyan (El Mhamdi et al. 2018, 1802.07927), section 4, on B alone",
    ),
    Recipe(
        "trimmed-mean",
        train=OnlyB(),
        weigh=Uniform(),
        reduce=TrimmedMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="trimmed mean (Yin et al. 2018, 1803.01498), definition 2, on B alone",
    ),
    Recipe(
        "median",
        train=OnlyB(),
        weigh=Uniform(),
        reduce=Median(),
        refactor=Keep(),
        distribute=Same(),
        reference="median (Yin et al. 2018, 1803.01498), definition 1, on B alone",
    ),
    Recipe(
        "lora-a2",
        train=AlternateSelect(),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="LoRA-A2 (Koo et al. 2025, 2410.22815), section 4",
    ),
    Recipe(
        "fed-plora",
        train=RandomRanks(),
        reduce=IndexMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="Fed-PLoRA (Zhang et al. 2026, 2602.16936), select-N-fold",
    ),
    Recipe(
        "hetlora",
        weigh=Frobenius(),
        reduce=PaddedMean(delta=False),
        refactor=Keep(),
        distribute=Cut(),
        reference="HetLoRA (Cho et al. 2024, 2401.06432), section 3.2, without self-pruning",
    ),
    Recipe(
        "fedask",
        reduce=Sketch(),
        refactor=Svd(residual_rank=0, balance="sqrt"),
        reference="FedASK (Wen et al. 2025, 2507.09990), algorithm 1",
    ),
    Recipe(
        "flasc",
        codec=TopK(density=0.25, values="float32"),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Sparse(),
        reference="FLASC (Kuo et al. 2024, 2406.05233), algorithm 1",
    ),
    Recipe(
        "dp-fedlora",
        private=FactorNoise(),
        refactor=Fresh(),
        reference="DP-FedLoRA (2509.09097), a control: see its warning",
    ),
    Recipe(
        "fedbuff",
        weigh=Staleness(),
        reference="FedBuff (Nguyen et al. 2022, 2106.06639), algorithm 1, of exact products",
    ),
    Recipe(
        "fedsvd",
        train=OnlyB(),
        reduce=FactorMean(),
        refactor=Svd(residual_rank=0),
        distribute=Same(),
        reference="FedSVD (2505.12805), section 3 and algorithm 1",
    ),
    Recipe(
        "fed-sb",
        train=Core(),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="Fed-SB (Singhal et al. 2025, 2502.15436), in a public random basis",
    ),
    Recipe(
        "fedrot-lora",
        train=Aligned(),
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedRot-LoRA (Zhang et al. 2026, 2602.23638), soft rotation",
    ),
    Recipe(
        "lora-fair",
        reduce=FactorMean(),
        refactor=Ridge(),
        distribute=Same(),
        reference="LoRA-FAIR (Bian et al. 2025, 2411.14961), in ridge form",
    ),
    Recipe(
        "fedavgm",
        reduce=FactorMean(),
        optimise=Momentum(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedAvgM (Hsu et al. 2019, 1909.06335), on the factors",
    ),
    Recipe(
        "fedadam",
        reduce=FactorMean(),
        optimise=FedAdam(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedAdam (Reddi et al. 2021, 2003.00295), algorithm 2, on the factors",
    ),
    Recipe(
        "fedyogi",
        reduce=FactorMean(),
        optimise=FedYogi(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedYogi (Reddi et al. 2021, 2003.00295), algorithm 2, on the factors",
    ),
    Recipe(
        "fedadagrad",
        reduce=FactorMean(),
        optimise=FedAdagrad(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedAdagrad (Reddi et al. 2021, 2003.00295), algorithm 2, on the factors",
    ),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({chosen.name: chosen for chosen in _ALL})


def recipe(name: str, pieces: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by name.

    Args:
        name: of ``RECIPES``.
        pieces: choices to take instead of the recipe's own, see :meth:`Recipe.with_pieces`.

    Raises:
        RecipeError: listing the names, with the nearest one first; or if the pieces do not go
            together.
    """
    if name in RECIPES:
        return RECIPES[name].with_pieces(pieces or {})
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"no recipe {name!r}; {hint}allowed: {', '.join(RECIPES)}")
