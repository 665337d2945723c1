"""A run's recipe with client-level privacy in it: the piece that noises the sum, and equal weights.

>>> from aggregation.recipes import recipe
>>> central = CentralPrivacy(delta=1e-3, noise_multiplier=1.0, rounds=5, clients=100)
>>> print(with_client_privacy(recipe("ffa-lora"), central))
ffa-lora: only-b | float32 | uniform | factor-mean | client-dp(cohort=100) | sgd | keep | same
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from aggregation.errors import RecipeError
from aggregation.recipe import Recipe
from aggregation.secure_pieces import with_secure_sum
from aggregation.weighing import Uniform
from federation.recipe_checks import RoundsError
from privacy.central import CentralPrivacy
from privacy.errors import PrivacyError


def with_client_privacy(
    chosen: Recipe,
    central: CentralPrivacy | None,
    *,
    pieces: Mapping[str, str] | None = None,
    min_updates: int = 1,
) -> Recipe:
    """The recipe that does what is promised.

    Args:
        chosen: the recipe with the pieces that the run replaces.
        central: what is promised; None for nothing.
        pieces: those that the run replaces, as they are written: a weight that was asked for is
            kept, and then refused; else all clients count the same.
        min_updates: with fewer usable updates, rounds without such privacy change nothing.

    Raises:
        RoundsError: if the recipe cannot keep the promise, with the remedy; or if there is noise
            and nobody counts it.
    """
    hidden = bool(getattr(chosen.private, "central", False))
    if central is None:
        if hidden:
            raise RoundsError(
                f"private={chosen.private} is noise that nobody counts: leave it out, and write "
                "[client_privacy] instead, which chooses it and keeps the account"
            )
        return chosen
    if chosen.private.kind not in ("none", "secure-sum"):
        raise RoundsError(
            f"recipe {chosen.name} has private={chosen.private} of its own, and client privacy "
            "chooses that piece itself; choose private=none or secure-sum, or leave client privacy "
            "out"
        )
    # The clients' own noise hides what they send, and not that they do.
    if min_updates > 1 and central.mechanism != "distributed":
        raise RoundsError(
            f"min_updates = {min_updates}: with client privacy every round releases its noise, "
            "whoever came, since a round without a result would tell how few they were; leave "
            "min_updates out"
        )
    if getattr(chosen.private, "secure", False) and central.sampling == "poisson":
        raise RoundsError(
            f"private={chosen.private} tells each member of a sum who the others are, and "
            "sampling = 'poisson' earns nothing against those who know who was drawn; choose "
            "sampling = 'fixed', or leave the secure sum out"
        )
    weigh = chosen.weigh if "weigh" in (pieces or {}) else Uniform()
    try:
        piece = with_secure_sum(central.piece(), chosen.private)
        return replace(chosen, private=piece, weigh=weigh)
    except (RecipeError, PrivacyError) as error:
        raise RoundsError(str(error)) from None
