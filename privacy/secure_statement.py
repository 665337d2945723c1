"""What the privacy statement says of a secure sum, and in which words.

>>> doc = section([{"members": 12, "threshold": 9, "summed": 11, "bound": 2e-7,
...                 "given_up": ""}], bits=32, identities="test")
>>> doc["rounds"], doc["summed"]
({'summed': 1, 'given_up': 0}, [11, 11])
>>> sentences(doc)[0]
'Updates were added up by a secure sum: the server saw sums of 11 clients, and no update.'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from privacy.wording import span

SIMULATED = "keys derived from the scenario's seed: whoever knows it knows them all"

# Of noise that the server adds to a sum that it sees unmasked.
TRUSTED = (
    "the server, which sees the sum of a round's updates, and no update, before it adds the noise; "
    "and every client to clip its own update, which nobody else can see"
)

# Members are told who the others are, and a round with too few of them is given up.
NEIGHBOURS = (
    "one client's updates in the sums, or zeros in their place; that it takes part is not hidden"
)
PARTICIPATION = (
    "which clients took part in which round, and that a round was given up: the members of a "
    "secure sum are told who the others are"
)

NOT_COVERED = (
    "what the sums themselves tell of a client: for that there is noise, or there is nothing",
    "two rounds with nearly the same clients and data: their sums can be compared",
    "which clients took part, when, how long they took, and what their privacy events say",
    "a roster of identities that the server itself has filled with clients of its own",
    "clients in league with the server, once they are as many as the threshold among those that "
    "hold the pieces of a client's secrets; with a server that lies, fewer: see docs/privacy.md",
    "clients that send other numbers than they should: nobody sees them one by one",
)


def section(
    rounds: Sequence[Mapping[str, Any]], *, bits: int, identities: str
) -> dict[str, Any] | None:
    """The part ``secure_sum`` of a privacy statement; None if there was no secure sum.

    Args:
        rounds: what each round recorded of its secure sum (``federation.rounds.Round.secure``).
        bits: of a number on the wire.
        identities: where the clients' identities came from, in words.
    """
    asked = [said for said in rounds if said]
    done = [said for said in asked if not said["given_up"]]
    if not asked:
        return None
    return {
        "protocol": "SecAgg+ (Bell et al. 2020), with signed keys and a check that all survivors "
        "were told the same (Bonawitz et al. 2017)",
        "rounds": {"summed": len(done), "given_up": len(asked) - len(done)},
        "summed": _range(said["summed"] for said in done),
        "members": _range(said["members"] for said in asked if "members" in said),
        "threshold": _range(said["threshold"] for said in asked if "threshold" in said),
        "bits": bits,
        "largest_error_of_a_mean": max((said["bound"] for said in done), default=0.0),
        "identities": identities,
        "protects_against": "a server that follows the protocol, and one that lies about who "
        "dropped out, as long as the roster of identities is right",
        "not_covered": list(NOT_COVERED),
    }


def of_clients(part: Mapping[str, Any]) -> dict[str, Any]:
    """The part ``client`` of a statement, where the server noises a sum that it sees unmasked.

    Args:
        part: as it is without a secure sum (:func:`privacy.cohort_statement.section`).
    """
    others = [said for said in part["not_covered"] if not said.startswith("which clients took")]
    return {
        **part,
        "trusted": TRUSTED,
        "neighbours": NEIGHBOURS,
        "participation": PARTICIPATION,
        "not_covered": [PARTICIPATION, *others],
    }


def shares(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of noise that clients added: the ``least`` in a sum and the ``honest`` of them, as ranges.

    Args:
        rounds: as for :func:`section`.
    """
    noised = [said for said in rounds if "honest" in said]
    return {key: _range(said[key] for said in noised) for key in ("least", "honest")}


def sentences(doc: Mapping[str, Any]) -> list[str]:
    """The same for people.

    Raises:
        KeyError, TypeError, ValueError: if a field is missing or of another kind.
    """
    rounds = doc["rounds"]
    given_up = (
        f" {rounds['given_up']} rounds were given up rather than be put together from too few."
        if rounds["given_up"]
        else ""
    )
    return [
        f"Updates were added up by a secure sum: the server saw sums of {span(doc['summed'])} "
        f"clients, and no update.{given_up}",
        f"To take the masks off one client's update, {span(doc['threshold'])} of "
        f"{span(doc['members'])} clients would have to help. It protects against "
        f"{doc['protects_against']}. Identities: {doc['identities']}.",
        "The secure sum does not cover: " + "; ".join(doc["not_covered"]) + ".",
    ]


def _range(values: Any) -> list[int]:
    found = sorted(values)
    return [found[0], found[-1]] if found else [0, 0]
