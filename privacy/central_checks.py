"""Which settings of client-level privacy go with which mechanism.

``gaussian`` counts every round by itself and earns amplification by Poisson sampling. ``tree``
counts on rounds between two participations of a client. ``distributed`` protects against the server
too, which knows who was drawn, and has only sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from privacy.budget import Accountant, BudgetError
from privacy.events import MECHANISMS

if TYPE_CHECKING:
    from privacy.central import CentralPrivacy


def check_mechanism(central: CentralPrivacy) -> None:
    """Refuse what contradicts the mechanism.

    Raises:
        BudgetError: with the nearest sound choice.
    """
    if central.mechanism not in MECHANISMS:
        raise BudgetError(
            f"client privacy: mechanism={central.mechanism!r} is not {' or '.join(MECHANISMS)}"
        )
    of_trees = {
        "separation": central.separation != 1,
        "participations": central.participations is not None,
        "restart": central.restart != 0,
    }
    if central.mechanism != "tree":
        for name, given in of_trees.items():
            if given:
                raise BudgetError(
                    f"client privacy: {name} means nothing to mechanism={central.mechanism!r}, "
                    "which counts every round; leave it out, or choose mechanism='tree'"
                )
        if central.mechanism == "distributed":
            _check_distributed(central)
        return
    if central.sampling == "poisson":
        raise BudgetError(
            "client privacy: mechanism='tree' relies on rounds between two participations of a "
            "client, which sampling='poisson' leaves to chance; choose sampling='fixed', or "
            "mechanism='gaussian', which earns amplification by it"
        )
    if central.quantile is not None:
        raise BudgetError(
            "client privacy: mechanism='tree' takes noise back in later rounds, for which the "
            "clip has to stay: leave quantile out, or choose mechanism='gaussian'"
        )
    if central.cohort * central.separation > central.clients:
        raise BudgetError(
            f"client privacy: with separation={central.separation}, {central.separation} rounds in "
            f"a row need other clients each, {central.cohort:.0f} a round of {central.clients} in "
            f"all: choose a separation of {max(1, int(central.clients / central.cohort))}, or a "
            f"fraction of {1 / central.separation:.3g} or less"
        )


def _check_distributed(central: CentralPrivacy) -> None:
    said = "client privacy: mechanism='distributed' "
    if central.sampling == "poisson":
        raise BudgetError(
            f"{said}protects against the server, which knows who was drawn, so sampling="
            "'poisson' earns nothing; choose sampling='fixed', or mechanism='gaussian'"
        )
    if central.quantile is not None:
        raise BudgetError(
            f"{said}has no count of the updates within the clip: leave quantile out, or choose "
            "mechanism='gaussian'"
        )
    if central.accountant is not Accountant.RDP:
        raise BudgetError(
            f"{said}is bounded by its Renyi divergences (concentrated differential privacy): "
            "choose accountant='rdp'"
        )
