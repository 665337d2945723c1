"""Which recipes can aggregate adapters that have no factors: IA3, prompts, prefixes, bottlenecks.

Such an adapter is a set of tensors that mean something one by one, as a head does. They have a
weighted mean, and coordinate-wise rules, for nobody is free to write them in another gauge.
Whatever works on products of factors would quietly do nothing to them, so it is refused instead.

A DoRA adapter has factors, and magnitudes by which whole rows of W + s B A are scaled. What a
recipe keeps beside the adapter would lie outside that scaling: those recipes are refused as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aggregation.spec import AdapterSpec

if TYPE_CHECKING:
    from aggregation.recipe import Recipe


def objection(recipe: Recipe, spec: AdapterSpec) -> str:
    """Why a recipe cannot aggregate such adapters, with the remedy; empty if it can."""
    if spec.setting("use_dora", False) and recipe.refactor.beside:
        return (
            f"refactor={recipe.refactor} keeps a part of the update beside the adapter, where "
            "DoRA's magnitudes do not reach it; choose svd-warm-start or fedit"
        )
    if spec.modules:
        return ""
    piece = _lora_only(recipe)
    if not piece:
        return ""
    return (
        f"{piece}={getattr(recipe, piece)} makes sense for LoRA only, and the adapter is of type "
        f"{spec.peft_type}, which has no factors but named tensors; choose fedit (their weighted "
        "mean), or against liars median or trimmed-mean (coordinate by coordinate)"
    )


def _lora_only(recipe: Recipe) -> str:
    """The first piece that needs factors, or nothing."""
    coordinates = recipe.reduce.coordinate_wise
    if recipe.reduce.kind != "factor-mean" and not coordinates:
        return "reduce"
    # A coordinate rule trains B alone to fix the gauge of the factors; without any, that is all.
    if recipe.train.kind != "both" and not (coordinates and recipe.train.kind == "only-b"):
        return "train"
    if recipe.refactor.kind != "keep":
        return "refactor"
    if recipe.distribute.kind != "same":
        return "distribute"
    return "private" if recipe.private.kind == "factor-noise" else ""
