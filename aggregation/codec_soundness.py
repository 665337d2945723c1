"""Which codecs go with which other pieces; used by :mod:`aggregation.soundness`.

A lossy codec that sends every coordinate (a cast, blocks, a ring) makes an adapter near the trained
one, which any reduce may take; so does top-k, further away. What is refused here is where the
codec's own choice of scale or places, or its arithmetic, breaks what another piece relies on.

Segments need care. A client that sends a quarter of the coordinates has not left the others
unchanged, and a plain mean that counts it so moves everything by a quarter of a step. So either
the mean of each coordinate is over those who sent it (EcoLoRA's rule, ``sent-mean``), or what
waits is kept and comes with the next turn (error feedback), in a plain mean: then a coordinate
comes to a quarter of the clients at a time with four rounds' worth of change. Both at once would
move by four rounds' worth in every round; and a product of factors of which some coordinates are
from one round and some from another is nobody's update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aggregation.codecs import Segments
from aggregation.index_mean import IndexMean
from aggregation.reducing import FactorMean
from aggregation.refactoring import Keep
from aggregation.sent_mean import SentMean

if TYPE_CHECKING:
    from aggregation.recipe import Recipe


def places_of_its_own_in_a_secure_sum(recipe: Recipe) -> str:
    """A secure sum adds what travels without reading it."""
    if not getattr(recipe.private, "secure", False) or recipe.codec.linear:
        return ""
    return (
        f"codec={recipe.codec} writes each client's values on a scale or at places of its own, and "
        f"private={recipe.private} adds them up without reading any; choose codec=ring or "
        "codec=float32, and fewer bits of the secure sum to send less"
    )


def segments_in_their_mean(recipe: Recipe) -> str:
    """A part of the coordinates is averaged over those that sent it, or nothing of it is lost."""
    codec, reduce = recipe.codec, recipe.reduce
    if not isinstance(codec, Segments):
        return ""
    wanted, instead = (
        (FactorMean, "reduce=factor-mean")
        if codec.error_feedback
        else (SentMean, "reduce=sent-mean, or codec=segments(error_feedback=true) and factor-mean")
    )
    if type(reduce) is not wanted:
        why = (
            "brings several rounds' changes of some coordinates at once, which have to be averaged "
            "over all clients, coordinate by coordinate"
            if codec.error_feedback
            else "brings the changes of some coordinates and says nothing of the others, so that "
            "each has to be averaged over those who sent it"
        )
        return f"codec={codec} {why}, and reduce={reduce} does not; choose {instead}"
    if not isinstance(recipe.refactor, Keep):
        return (
            f"refactor={recipe.refactor} uses the products of the clients' factors, of which codec="
            f"{codec} sends some coordinates at a time; choose refactor=keep, or codec=int8"
        )
    if recipe.weigh.measured:
        return (
            f"weigh={recipe.weigh} measures the products of the clients' factors, of which codec="
            f"{codec} sends some coordinates at a time; choose weigh=examples, or codec=int8"
        )
    return ""


def mean_of_what_everybody_sends(recipe: Recipe) -> str:
    """Without segments everybody sends every coordinate, or chooses what is worth sending."""
    if not isinstance(recipe.reduce, SentMean) or isinstance(recipe.codec, Segments):
        return ""
    return (
        f"reduce={recipe.reduce} averages a coordinate over those whose turn it was to send it, "
        f"and codec={recipe.codec} has no turns; choose reduce=factor-mean, or codec=segments"
    )


def noise_over_a_count_that_varies(recipe: Recipe) -> str:
    """Client-level noise is added to a sum, which is divided by a number fixed beforehand."""
    if not (getattr(recipe.private, "central", False) and isinstance(recipe.reduce, SentMean)):
        return ""
    return (
        f"private={recipe.private} hides one client's part in a sum over a fixed number of them, "
        f"and reduce={recipe.reduce} divides each coordinate by however many sent it; choose "
        "reduce=factor-mean with codec=segments(error_feedback=true), or another codec"
    )


def memory_of_other_indices(recipe: Recipe) -> str:
    """What waited for an index that the client has not chosen this time would count as a choice."""
    if not (recipe.codec.stateful and isinstance(recipe.reduce, IndexMean)):
        return ""
    return (
        f"codec={recipe.codec} sends what was left over of indices that a client trained earlier, "
        f"and reduce={recipe.reduce} sees from what moved who trained an index in this round; "
        "choose error_feedback=false, or reduce=factor-mean"
    )


RULES = (
    places_of_its_own_in_a_secure_sum,
    segments_in_their_mean,
    mean_of_what_everybody_sends,
    noise_over_a_count_that_varies,
    memory_of_other_indices,
)
