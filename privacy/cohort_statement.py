"""What the privacy statement says about whole clients, and in which words.

    >>> from privacy.central import CentralPrivacy
    >>> central = CentralPrivacy(delta=1e-4, noise_multiplier=1.0, rounds=50, clients=1000,
    ...                          fraction=0.05, sampling="poisson")
    >>> doc = section(central, [central.event()] * 50, rounds=50, randomness="test")
    >>> doc["unit"], round(doc["epsilon"], 2)
    ('client', 2.61)
    >>> sentences(doc)[0]
    'One client: epsilon 2.61 at delta 0.0001.'

Epsilon is recomputed from the events, which are those of the server's ledger. What comes after the
noise, the server's optimiser or an SVD, is no part of it: it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from privacy import calibration
from privacy.central import CentralPrivacy
from privacy.events import CohortEvent
from privacy.wording import at_most, odds, span

NOT_COVERED = (
    "the server itself, and whoever reads its memory, its disk or the clients' connections to it",
    "which clients took part in which round, and how many: the run's records tell, so they are for "
    "the server alone",
    "other trainings with the same clients: what they spend adds to this; the server's ledger "
    "keeps the sum of those that it ran",
    "accuracy and loss that clients measured and sent in the clear, and how much data they say "
    "they have",
    "the choice of settings, if it was tried out on the same clients",
    "a person behind several clients: k clients of one person have k times this epsilon",
    "what the part about examples, if there is one, tells of the clients' number and sizes",
)


NOT_COVERED_BY_SHARES = (
    "which clients took part in which round, how many, and that a round was given up",
    "more clients in league with the server, or fewer in a sum, than is counted on: with h of them "
    "left the noise is smaller by the square root of the share that h is",
    "further sums that the server asks for and does not count: only its own ledger holds how many",
    *NOT_COVERED[2:],
)
_NAMES = {
    "gaussian": "DP-FedAvg",
    "tree": "DP-FTRL, noise on partial sums of rounds",
    "distributed": "DP-FedAvg with distributed discrete Gaussian noise, which the clients add in "
    "shares before a secure sum",
}


def section(
    central: CentralPrivacy,
    events: Sequence[CohortEvent],
    *,
    rounds: int,
    randomness: str,
    shares: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The part ``client`` of a privacy statement.

    Args:
        central: what the run promises.
        events: what was spent on this adapter's line of training, from the server's ledger.
        rounds: how many were trained.
        randomness: where the noise and the cohorts came from, in words.
        shares: of noise that clients add: what :func:`privacy.secure_statement.shares` found.

    Returns:
        plain values that JSON can hold.
    """
    spent = calibration.epsilon(events, central.delta, central.accountant)
    tree = central.mechanism == "tree"
    mechanism: dict[str, Any] = {
        "name": _NAMES[central.mechanism],
        "clip": "all that a client transmits in a round, as one vector, Euclidean norm",
        "max_norm": central.clip,
        "quantile": central.quantile,
        "noise_multiplier": central.noise(),
        "sensitivity": central.sensitivity,
        "divisor": central.cohort,
        "rounds": rounds,
        "sampling": _sampling(central),
        "randomness": randomness,
    }
    if tree:
        mechanism |= {
            "rounds_of_a_tree": central.tree_rounds,
            "separation": central.separation,
            "participations": central.most_participations,
        }
    found = {
        "unit": "client",
        "neighbours": _neighbours(central),
        "epsilon": spent if math.isfinite(spent) else None,
        "delta": central.delta,
        "budget": central.epsilon,
        "clients": central.clients,
        "events": sum(event.steps for event in events),
        "protects_against": "the other clients, and everyone who gets the adapters of all rounds",
        "trusted": "the server, which sees every update before it adds the noise",
        "mechanism": mechanism,
        "accountant": {
            "name": central.accountant.value,
            "library": f"dp-accounting {version('dp-accounting')}",
        },
        "not_covered": list(NOT_COVERED),
        "limits": "noise is made in floating point, as sums of four, rounded to a grid of 2^-40 of "
        "the clip, and added to whole numbers",
    }
    return found | _of_shares(shares or {}) if central.mechanism == "distributed" else found


def _of_shares(shares: Mapping[str, Any]) -> dict[str, Any]:
    """What is said otherwise where the clients add the noise.

    Args:
        shares: ``least`` and ``honest`` clients, each as a range over the rounds; empty if there
            was no round yet.
    """
    least, honest = span(shares.get("least", [0, 0])), span(shares.get("honest", [0, 0]))
    return {
        "shares": dict(shares),
        "protects_against": "the server, which sees no sum without noise, the other clients, and "
        "everyone who gets the adapters of all rounds",
        "trusted": f"{honest} of the {least} or more clients in each sum, to clip their update, to "
        "add their share of the noise and to tell it to nobody; not the server, as long as it asks "
        "for this noise (a device can insist on it) and the secure sum holds",
        "not_covered": list(NOT_COVERED_BY_SHARES),
        "limits": "noise is whole numbers, sampled exactly (discrete Gaussian); a sum beyond ten "
        "standard deviations of it wraps around, once in 10^13 rounds",
    }


def _sampling(central: CentralPrivacy) -> dict[str, Any]:
    """What the accounting assumes, and what was done."""
    if central.sampling == "poisson":
        said = (
            f"every client that is there is drawn with probability {central.fraction:g} in each "
            "round, on its own, by a coin that only the server sees"
        )
        return {"assumed": said, "done": said, "sample_rate": central.sample_rate}
    apart = (
        f", at most once in {central.separation} rounds and {central.most_participations} times "
        f"in {central.tree_rounds}"
        if central.mechanism == "tree"
        else ""
    )
    number = f"{central.cohort:.0f} of {central.clients} clients"
    return {
        "assumed": f"none: every client counts as if it were always drawn{apart}",
        "done": f"{number} in each round{apart}",
        "sample_rate": 1.0,
    }


def _neighbours(central: CentralPrivacy) -> str:
    if central.mechanism == "distributed":
        return (
            "one client's updates in the sums, or zeros in their place; that it takes part, and "
            "adds its noise, is not hidden"
        )
    if central.sampling == "poisson" or central.fraction == 1.0:
        return "one client added or removed, with everything that it has"
    return "one client's updates in the sums, or nothing in their place"


def sentences(client: Mapping[str, Any]) -> list[str]:
    """The part ``client`` in plain sentences.

    Raises:
        KeyError, TypeError, ValueError: if it is not one.
    """
    mechanism, accountant = client["mechanism"], client["accountant"]
    if client["epsilon"] is None:
        return ["Whole clients: no privacy is promised, some rounds added no noise."]
    epsilon, delta = float(client["epsilon"]), f"{client['delta']:g}"
    sampling = mechanism["sampling"]
    moving = (
        f" at first, and then to about the {100 * mechanism['quantile']:.0f} % quantile of their "
        "lengths"
        if mechanism["quantile"] is not None
        else ""
    )
    shared = "shares" in client
    known = shared or "participation" in client
    seen = "sums and adapters" if shared else "adapters"
    told = "contributed anything" if known else "took part at all"
    counted = (
        "the accounting assumes just that"
        if sampling["assumed"] == sampling["done"]
        else f"what the accounting assumes: {sampling['assumed']}"
    )
    return [
        f"One client: epsilon {at_most(epsilon)} at delta {delta}.",
        f"What it means: whoever sees the {seen} of all rounds can change their odds on whether "
        f"one given client {told} by a factor of at most {odds(epsilon)}, except with a "
        f"probability of about {delta}. Each single example of a client is covered with it.",
        f"It protects against {client['protects_against']}. Who has to be trusted: "
        f"{client['trusted']}{'' if known else ', and keeps to itself who takes part when'}.",
        f"How: {mechanism['name']}. What a client sends in a round is limited to length "
        f"{mechanism['max_norm']:g}{moving}, and noise of {mechanism['noise_multiplier']:.3g} "
        f"times that is added to the sum, which is divided by {mechanism['divisor']:g}, whoever "
        f"came; {mechanism['rounds']} rounds.",
        f"Who takes part: {sampling['done']}; {counted}.",
        f"Neighbouring sets of clients: {client['neighbours']}. Counted by "
        f"{accountant['name'].upper()} ({accountant['library']}).",
        f"Randomness {'of the clients' if shared else 'at the server'}: {mechanism['randomness']}.",
        "Not covered for clients: " + "; ".join(client["not_covered"]) + ".",
    ]
