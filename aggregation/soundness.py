"""Which pieces go together. Each rule says why not, and the nearest sound choice.

A rule is a function from a recipe to a reason; an empty reason means that it has no objection. A
further rule is a further function in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aggregation import central_rules, codec_soundness, secure_pieces, server_rules
from aggregation.distributing import Truncate
from aggregation.folding import Fresh, MeanResidual, SvdFold
from aggregation.index_mean import IndexMean
from aggregation.padded_mean import PaddedMean
from aggregation.pieces import FactorNoise
from aggregation.reducing import FactorMean
from aggregation.refactoring import Keep, Svd
from aggregation.sketching import Sketch
from aggregation.sparse import Sparse

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

Rule = Callable[["Recipe"], str]


def objection(recipe: Recipe) -> str:
    """The first reason against a combination, or nothing."""
    return next((reason for rule in RULES if (reason := rule(recipe))), "")


def _mean_of_mixed_ranks(recipe: Recipe) -> str:
    if isinstance(recipe.reduce, FactorMean) and recipe.distribute.mixed_ranks:
        return (
            "reduce=factor-mean averages B and A entry by entry, which needs the same rank "
            f"everywhere, but distribute={recipe.distribute} hands out several; choose "
            "distribute=same, or reduce=product-sum for mixed ranks"
        )
    return ""


def _mean_in_a_turned_gauge(recipe: Recipe) -> str:
    turned = isinstance(recipe.refactor, Svd | SvdFold) and not server_rules.lossless_svd(recipe)
    if isinstance(recipe.reduce, FactorMean) and turned:
        return (
            f"refactor={recipe.refactor} turns the factors into another gauge, in which the mean "
            "of the factors of a client that started earlier means nothing; choose refactor=keep, "
            "or reduce=product-sum (or train=only-b, whose clients share one A, for refactor=svd)"
        )
    return ""


def _idle_mean(recipe: Recipe) -> str:
    if isinstance(recipe.reduce, FactorMean) and isinstance(recipe.refactor, Fresh):
        return (
            "refactor=fresh throws the factors away and keeps their exact products, so averaging "
            "the factors is idle; choose reduce=product-sum, or refactor=mean-residual"
        )
    return ""


def _sum_that_does_not_fit(recipe: Recipe) -> str:
    if not recipe.reduce.factors and isinstance(recipe.refactor, Keep | MeanResidual):
        return (
            f"reduce={recipe.reduce} yields a matrix of a rank up to the sum of all clients' "
            f"ranks, which refactor={recipe.refactor} cannot hold; choose refactor=svd"
        )
    return ""


def _absolute_sum_kept(recipe: Recipe) -> str:
    kept = Svd | Keep if isinstance(recipe.reduce, PaddedMean) else Svd
    if not recipe.reduce.delta and not isinstance(recipe.refactor, kept):
        return (
            f"reduce={recipe.reduce} counts what a truncated client never held as zero, which "
            f"refactor={recipe.refactor} would keep for ever; choose reduce=product-sum"
        )
    return ""


def _coordinates_in_a_free_gauge(recipe: Recipe) -> str:
    reduce, train = recipe.reduce, recipe.train
    if not reduce.coordinate_wise:
        return ""
    if not train.fixed_gauge:
        return (
            f"reduce={reduce} decides each coordinate of the factors by itself, and with "
            f"train={train} clients can turn their factors into any gauge, in which a coordinate "
            "means something else; choose train=only-b, or reduce=geometric-median, which looks "
            "at products"
        )
    task = train.assignment(1)
    if task.trains == "core" or task.select:
        return (
            f"reduce={reduce} decides each coordinate of the factors by itself, and with "
            f"train={train} clients do not all move each of them on its own; choose train=only-b, "
            "or reduce=geometric-median, which looks at products"
        )
    return ""


def _coordinates_elsewhere(recipe: Recipe) -> str:
    if not recipe.reduce.coordinate_wise:
        return ""
    if recipe.distribute.mixed_ranks:
        return (
            f"reduce={recipe.reduce} needs the same rank everywhere, but distribute="
            f"{recipe.distribute} hands out several; choose distribute=same, or "
            "reduce=geometric-median for mixed ranks"
        )
    if not isinstance(recipe.refactor, Keep):
        return (
            f"reduce={recipe.reduce} says how the factors move, and refactor={recipe.refactor} "
            "turns them into others; choose refactor=keep"
        )
    return ""


def _robust_but_blind(recipe: Recipe) -> str:
    if not recipe.reduce.robust:
        return ""
    if getattr(recipe.private, "secure", False):
        return (
            f"reduce={recipe.reduce} has to see each update by itself, which private="
            f"{recipe.private} prevents; choose private=none, or reduce=factor-mean"
        )
    if getattr(recipe.private, "central", False):
        return (
            f"private={recipe.private} bounds what one client can do to a plain sum, and to "
            f"reduce={recipe.reduce} it can do more: leave and so change who is believed; choose "
            "private=none, or reduce=factor-mean"
        )
    return ""


def _indices_in_a_turned_gauge(recipe: Recipe) -> str:
    if not isinstance(recipe.reduce, PaddedMean | IndexMean):
        return ""
    if isinstance(recipe.distribute, Truncate):
        return (
            f"reduce={recipe.reduce} adds up index j of all clients, and distribute=truncate turns "
            "each rank's factors its own way; choose distribute=cut, which hands out the first "
            "indices, or reduce=product-sum"
        )
    if recipe.refactor.turns:
        return (
            f"refactor={recipe.refactor} turns the factors, so that index j means another thing "
            f"in every round, and reduce={recipe.reduce} adds up index j; choose refactor=keep, or "
            "reduce=rank-mean"
        )
    return ""


def _late_updates_of_another_mean(recipe: Recipe) -> str:
    reduce = recipe.reduce
    if recipe.weigh.max_staleness is None:
        return ""
    if isinstance(reduce, Sketch):
        return (
            "reduce=sketch asks the same clients twice in a round, and weigh=staleness has no "
            "rounds; choose reduce=product-sum"
        )
    if recipe.refactor.beside:
        return (
            f"refactor={recipe.refactor} has clients train beside what belongs to one version, and "
            "weigh=staleness takes updates of several; choose refactor=svd, whose rest stays on "
            "the server"
        )
    if not (reduce.weighted and reduce.delta):
        return (
            f"weigh=staleness makes late changes count less in a weighted mean of changes, and "
            f"reduce={reduce} is none; choose reduce=product-sum, or weigh=examples"
        )
    return ""


def _measured_weights(recipe: Recipe) -> str:
    if not recipe.weigh.measured:
        return ""
    if isinstance(recipe.reduce, Sketch):
        return (
            f"weigh={recipe.weigh} needs to see each product, and reduce=sketch sees sums of "
            "sketches; choose weigh=examples"
        )
    if recipe.reduce.robust:
        return (
            f"weigh={recipe.weigh} lets a client choose its own weight by the size of what it "
            f"sends, which reduce={recipe.reduce} is to prevent; choose weigh=uniform"
        )
    return ""


def _sketch_of_what_is_not_sent(recipe: Recipe) -> str:
    if not isinstance(recipe.reduce, Sketch):
        return ""
    tasks = [recipe.train.assignment(number) for number in (1, 2)]  # factors may alternate
    if any(t.sends not in ("both", "B") or t.select or t.keeps for t in tasks):
        return (
            f"reduce=sketch sketches the whole product, and train={recipe.train} sends a part; "
            "choose train=both or train=only-b"
        )
    if not recipe.codec.lossless:
        return (
            f"codec={recipe.codec} would round the first sketch otherwise than the second, which "
            "is of the factors as they were trained; choose codec=float32"
        )
    return ""


def _noise_on_a_part(recipe: Recipe) -> str:
    if isinstance(recipe.private, FactorNoise):
        task = recipe.train.assignment(1)
        if (task.sends, task.select, task.keeps) != ("both", "", ""):
            return (
                f"private=factor-noise clips and noises both factors, and train={recipe.train} "
                "sends a part; choose train=both, or private=none with [privacy], which is sound"
            )
        if isinstance(recipe.reduce, Sketch):
            return (
                "private=factor-noise noises the factors that a client sends, and reduce=sketch "
                "sends none; choose reduce=product-sum, or private=none with [privacy]"
            )
    return ""


def _absolute_sum_of_sparse(recipe: Recipe) -> str:
    if isinstance(recipe.distribute, Sparse) and not recipe.reduce.delta:
        return (
            f"reduce={recipe.reduce} counts an entry that was not handed out as zero, and "
            "distribute=sparse hands out few; choose reduce=factor-mean"
        )
    return ""


RULES: tuple[Rule, ...] = (
    _mean_of_mixed_ranks,
    _mean_in_a_turned_gauge,
    _idle_mean,
    _sum_that_does_not_fit,
    _absolute_sum_kept,
    _coordinates_in_a_free_gauge,
    _coordinates_elsewhere,
    _robust_but_blind,
    _indices_in_a_turned_gauge,
    _late_updates_of_another_mean,
    _measured_weights,
    _sketch_of_what_is_not_sent,
    _noise_on_a_part,
    _absolute_sum_of_sparse,
    *codec_soundness.RULES,
    *server_rules.RULES,
    *central_rules.RULES,
    *secure_pieces.RULES,
)
