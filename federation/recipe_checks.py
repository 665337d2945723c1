"""Which recipes can run how: refused before anybody is asked for anything, with the remedy."""

from __future__ import annotations

import math

from aggregation.describing import takes_mixed_ranks
from aggregation.errors import RecipeError
from aggregation.recipe import Recipe
from aggregation.recipes import RECIPES
from aggregation.secure_pieces import ring_of
from federation.errors import FederationError

FEWEST = 3  # members of a secure sum
BUFFER = 10  # updates in a step of a recipe without rounds: the K of FedBuff, 2106.06639


class RoundsError(FederationError):
    """Settings of a training run that contradict themselves."""


def check_recipe(
    chosen: Recipe,
    *,
    clients: int,
    fraction: float = 1.0,
    sampling: str = "fixed",
    trusted: str = "",
    mixed_ranks: bool = False,
    buffer: int | None = None,
    max_staleness: int | None = None,
    private: bool = False,
    min_updates: int = 1,
    holdout: float = 0.0,
) -> None:
    """Refuse a recipe that cannot run like this, before anybody is asked for anything.

    Args:
        chosen: the recipe.
        clients: how many there are; the other arguments are fields of :class:`RoundsConfig`.
        fraction: share of them that is drawn.
        sampling: how.
        trusted: the client that others are compared with.
        mixed_ranks: whether clients have different ranks.
        buffer: how many updates make a step.
        max_staleness: how old an update may be.
        private: whether clients train with example-level privacy.
        min_updates: a step with fewer usable updates changes nothing.
        holdout: share of each client's own examples that never train.

    Raises:
        RoundsError: with the reason and the remedy.
    """
    late = chosen.weigh.max_staleness is not None
    for name, value in (("buffer", buffer), ("max_staleness", max_staleness)):
        if value is not None and not late:
            raise RoundsError(
                f"{name} = {value}, but recipe {chosen.name} works in rounds, in which no update "
                "is late; choose recipe fedbuff, or leave it out"
            )
    if late and chosen.refactor.beside:
        raise RoundsError(
            f"recipe {chosen.name} with refactor={chosen.refactor} changes what clients load "
            "beside the adapter while they are at work: late updates trained on another model; "
            "choose refactor=svd, or another weigh than staleness"
        )
    if late:
        _check_buffer(chosen, buffer_size(buffer, clients, fraction), clients, min_updates)
        if holdout or sampling != "fixed":
            raise RoundsError(
                f"recipe {chosen.name} has no rounds, after which clients could measure (holdout = "
                f"{holdout:g}) or before which coins could be flipped (sampling = {sampling!r}); "
                "leave both out, or choose svd-warm-start"
            )
    if private and chosen.private.kind == "factor-noise":
        raise RoundsError(
            f"recipe {chosen.name} adds noise to the factors, and DP-SGD would be a second "
            "mechanism, of which one event cannot tell; leave privacy out, or choose ffa-lora or "
            "fedsvd with it"
        )
    if chosen.reduce.trusts and not trusted:
        raise RoundsError(
            f"recipe {chosen.name} compares every update with that of a trusted client: name one "
            "(federation.trusted = 0 in a scenario)"
        )
    if trusted and not chosen.reduce.trusts:
        raise RoundsError(
            f"trusted = {trusted!r}, but recipe {chosen.name} trusts nobody; choose recipe "
            "fltrust, or leave it out"
        )
    if mixed_ranks and not takes_mixed_ranks(chosen):
        able = ", ".join(name for name, known in RECIPES.items() if takes_mixed_ranks(known))
        raise RoundsError(
            f"recipe {chosen.name} needs one rank everywhere, and clients have several; "
            f"choose one of {able}, or one rank"
        )
    expected = expected_cohort(clients, fraction, sampling)
    if late:
        expected = buffer_size(buffer, clients, fraction)
    if trusted:
        expected = min(clients, expected + 1)
    if getattr(chosen.private, "secure", False):
        _check_secure(chosen, expected, clients, sampling)
    reason = chosen.reduce.needs(expected)
    if reason:
        raise RoundsError(
            f"recipe {chosen.name} with {expected} of {clients} clients in a round: {reason}"
        )


def _check_secure(chosen: Recipe, expected: int, clients: int, sampling: str) -> None:
    most = clients if sampling == "poisson" else expected
    if most < FEWEST:
        raise RoundsError(
            f"private={chosen.private} with {expected} of {clients} clients in a round: the sum of "
            f"two tells each of them the other's update; have at least {FEWEST}, or choose "
            "private=none"
        )
    try:
        ring_of(chosen, most)
    except RecipeError as error:
        raise RoundsError(f"private={chosen.private} with {most} clients: {error}") from None


def _check_buffer(chosen: Recipe, size: int, clients: int, min_updates: int) -> None:
    if not min_updates <= size <= clients:
        raise RoundsError(
            f"buffer = {size}: a step of recipe {chosen.name} needs at least min_updates = "
            f"{min_updates} updates, and a client gives at most one of them, so it must lie in "
            f"{min_updates}..{clients}"
        )


def buffer_size(buffer: int | None, clients: int, fraction: float) -> int:
    """How many updates make a step: as configured, else FedBuff's ten or as many as are at work."""
    return buffer or min(BUFFER, expected_cohort(clients, fraction, "fixed"))


def expected_cohort(clients: int, fraction: float, sampling: str) -> int:
    """How many clients a round asks: exactly so many, or about so many with ``poisson``."""
    if sampling == "poisson":
        return round(fraction * clients)
    return math.ceil(fraction * clients - 1e-9)
