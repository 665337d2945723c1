"""Which pieces go together with noise that the server adds to a sum of clipped updates.

Rules as in :mod:`aggregation.soundness`, beyond those of :mod:`aggregation.server_rules`.

A codec may do to a client's values what it likes, and remember what it likes on the client: it sees
that client's data only, and the clip comes after it, so one client's part in a sum stays within the
clip. A memory on the client does not hurt the amplification by sampling either: whether it takes
part in this round is a coin of its own, and given that coin, what it would send is some vector
within the clip, whichever rounds it had taken part in before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aggregation.client_dp import CentralPiece, ClientDpFtrl
from aggregation.reducing import FactorMean

if TYPE_CHECKING:
    from aggregation.recipe import Recipe


def _noise_on_another_sum(recipe: Recipe) -> str:
    if isinstance(recipe.private, CentralPiece) and type(recipe.reduce) is not FactorMean:
        return (
            f"private={recipe.private.kind} adds up the transmitted changes as they are and "
            f"divides by a fixed number, and reduce={recipe.reduce} forms another mean; choose "
            "reduce=factor-mean"
        )
    return ""


def _noise_without_rounds(recipe: Recipe) -> str:
    if getattr(recipe.private, "central", False) and recipe.weigh.max_staleness is not None:
        return (
            f"private={recipe.private} counts what a round costs, in which a client has one part, "
            f"and weigh={recipe.weigh} has no rounds; choose weigh=uniform"
        )
    return ""


def _noise_that_is_not_taken_back(recipe: Recipe) -> str:
    if not isinstance(recipe.private, ClientDpFtrl):
        return ""
    said = "private=client-dp-ftrl takes the noise of a round back in a later one, "
    first, second = (recipe.train.assignment(number).sends for number in (1, 2))
    if first != second:
        return said + (
            f"and with train={recipe.train} the later one sends other tensors; choose "
            "train=only-b, or private=client-dp"
        )
    if recipe.refactor.turns:
        return said + (
            f"and refactor={recipe.refactor} turns the factors in between; choose refactor=keep, "
            "or private=client-dp"
        )
    return ""


def advice(recipe: Recipe) -> str:
    """What whoever adds noise to this recipe's sum should know; empty if there is nothing."""
    if not getattr(recipe.private, "central", False):
        return ""
    if recipe.train.assignment(1).sends != "both":
        return ""
    return (
        "noise on the sums of both factors is multiplied in the model: its energy grows with the "
        "fourth power of the noise, where one factor's grows with the square; what is promised "
        "holds, but for accuracy choose fedsvd, ffa-lora or rolora"
    )


RULES = (_noise_on_another_sum, _noise_without_rounds, _noise_that_is_not_taken_back)
